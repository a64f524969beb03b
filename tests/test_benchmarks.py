"The benchmark compares equal work, and says nothing where it is not"
import importlib.util, pytest
from pathlib import Path
from fastai.vision.all import *
from kdfast.all import *

spec = importlib.util.spec_from_file_location('step_cost', Path(__file__).parent.parent/'benchmarks/step_cost.py')
step_cost = importlib.util.module_from_spec(spec)
spec.loader.exec_module(step_cost)

@pytest.fixture
def work():
    batch = torch.randn(4, 3, 32, 32),torch.randint(0, 10, (4,))
    return wrn(16, 2),wrn(10, 1),batch

def test_gradients_are_those_of_the_loop(work):
    teacher,student,batch = work
    assert step_cost.gradient_error(student, teacher, batch)<1e-5

@pytest.mark.parametrize('name', ['kd_loss','at_loss'])
def test_it_refuses_to_print_where_they_are_not(name, monkeypatch, capsys):
    "The loop is given another loss than kdfast has"
    right = getattr(step_cost, name)
    monkeypatch.setattr(step_cost, name, lambda *args: 1.001*right(*args))
    with pytest.raises(SystemExit, match='gradients differ'): step_cost.main(['--turns','1','--steps','1'])
    assert not capsys.readouterr().out

def test_each_way_trains_and_kdfast_takes_no_memory_of_its_own(work):
    teacher,student,batch = work
    times,memory = step_cost.measure(teacher, student, batch, 1, 1)
    assert memory['kdfast']<1.1*memory['loop by hand'] and memory['plain student']<memory['loop by hand']<memory['fasterai, two terms']
    lines = step_cost.table(times, memory).splitlines()
    assert len(lines)==2+len(times) and all(line.count('|')==6 for line in lines)

def test_the_committed_table_keeps_the_promise():
    rows = {r.split('|')[1].strip(): r.split('|') for r in (Path(__file__).parent.parent/'results/step_cost.md').read_text().splitlines() if r.startswith('|')}
    assert float(rows['kdfast'][3])<=1.05<float(rows['fasterai, two terms'][3])
