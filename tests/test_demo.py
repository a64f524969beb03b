"The demo runs, and KD helps in the records that it has left"
import json, math, subprocess, sys, pytest
from pathlib import Path
from statistics import mean, stdev

root = Path(__file__).parent.parent
records = [f for f in (root/'demo/record.json', root/'results/demo/record.json') if f.exists()]

def test_the_demo_writes_what_it_says(tmp_path):
    args = [Path(sys.executable).parent/'kdfast', 'demo', '--out', tmp_path/'out', '--epochs', '1', '--teacher-epochs', '1', '--seeds', '2']
    res = subprocess.run(args, capture_output=True, text=True, timeout=200, cwd=tmp_path)
    assert res.returncode==0, res.stderr
    assert {o.name for o in (tmp_path/'out').iterdir()}=={'record.json','curves.png','attention.png','student.pkl'}
    assert all(str(o) in res.stdout for o in (tmp_path/'out').iterdir())
    record = json.loads((tmp_path/'out/record.json').read_text())
    assert record['settings']==dict(epochs=1, teacher_epochs=1, seeds=2) and len(record['runs'])==1+2*5
    assert all(len(r['history']['accuracy'])==1 for r in record['runs'])
    from fastai.vision.all import load_learner, torch
    assert load_learner(tmp_path/'out/student.pkl').model(torch.zeros(2,3,32,32)).shape==(2,10)

@pytest.mark.parametrize('file', records, ids=lambda f: str(f.relative_to(root)))
def test_kd_is_better_than_the_control(file):
    runs = json.loads(file.read_text())['runs']
    kd,control = ([r['accuracy'] for r in runs if r['arm']==arm] for arm in ('kd','control'))
    assert len(kd)==len(control)>=3
    joint = math.sqrt(sum(stdev(o)**2/len(o) for o in (kd,control)))
    assert mean(kd)-mean(control)>joint

def test_there_is_a_record(): assert records
