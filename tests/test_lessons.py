"Lessons about precision hold on processors with native bfloat16 and without"
import json, os, re, subprocess, sys, pytest
from pathlib import Path
import torch
from kdfast.devices import native_bf16

nbs = Path(__file__).parent.parent/'nbs'

def code_of(nb): return '\n'.join(''.join(c['source']) for c in json.loads(nb.read_text())['cells'] if c['cell_type']=='code')

books = [str(o.relative_to(nbs)) for o in sorted(nbs.rglob('*.ipynb')) if '.ipynb_checkpoints' not in str(o) and re.search(r'\bprecision\b|bf16|Frozen', code_of(o))]

def test_there_are_such_lessons(): assert {'teacher/inference.ipynb','learner.ipynb','explanation/speed.ipynb'} <= {*books}

@pytest.mark.slow
@pytest.mark.parametrize('book', books)
def test_a_lesson_holds_on_the_other_kind_of_processor(book):
    other = str(int(not native_bf16(torch.device('cpu'))))
    res = subprocess.run([Path(sys.executable).parent/'nbdev-test', nbs/book], capture_output=True, text=True, timeout=600, env={**os.environ, 'KDFAST_NATIVE_BF16':other})
    assert res.returncode==0, res.stderr[-3000:]
