"What a user may combine: each cell that is drawn gives the right number, or an error of ours"
import os, pytest
from hypothesis import given, HealthCheck, seed, settings, strategies as st
from fastai.vision.all import *
from kdfast.all import *
from matrix import Cell, check, choices, sensible, tasks

start = int(os.environ.get('KDFAST_MATRIX_SEED', 0))  # another one draws other cells
n_quick,n_all = 60,240

@pytest.fixture(autouse=True, scope='module')
def native():
    "The same cells on every processor: where bfloat16 is not native, it is emulated"
    with pytest.MonkeyPatch.context() as env: yield env.setenv('KDFAST_NATIVE_BF16', '1')

def cells(**fixed): return st.builds(Cell, **{k:st.just(fixed[k]) if k in fixed else st.sampled_from(v) for k,v in choices.items()}).filter(sensible)
def drawn(n, part=0): return lambda f: seed(start+1000*part)(settings(max_examples=n, deadline=None, database=None, suppress_health_check=[*HealthCheck])(f))

def tried(cell):
    with tempfile.TemporaryDirectory() as folder:
        try: return check(cell, Path(folder))
        except Exception as e: raise AssertionError(f"{cell}, drawn with KDFAST_MATRIX_SEED={start}") from e

@drawn(n_quick)
@given(cells())
def test_some_cells(cell): tried(cell)

@pytest.mark.slow
@pytest.mark.parametrize('part', range(1, 5))
def test_many_cells(part):
    "In parts, which run beside each other"
    def each(cell): tried(cell)
    drawn(n_all//4, part)(given(cells())(each))()

@pytest.mark.slow
@pytest.mark.parametrize('task', tasks)
def test_what_every_task_can_do(task):
    "Plain networks and a list of samples: nothing is refused"
    for verb in choices['verb']:
        said = tried(Cell(task, 'list', 'none', 'student', 'tensor', 'default', verb))
        assert said=='right' or verb=='compare' and 'one label per image' in said, (verb, said)

def wrapped(wrapper, verbs):
    "What is refused of a wrapped student and teacher, with a term on outputs or one on features, in turns"
    each = itertools.product(verbs, choices['whose'])
    cells = [Cell('one_label', 'list', wrapper, whose, 'tensor', ('default','feature')[(i+i//2)%2], verb) for i,(verb,whose) in enumerate(each)]
    return {said for said in (tried(o) for o in cells if sensible(o)) if said!='right'}

known = dict(traced=["'deep' was not called"], reentrant=['without a graph','channel dependencies of this network cannot be traced'], half=['call .float() on'])
wrappers = pytest.mark.parametrize('wrapper', choices['wrapper'])

@wrappers
def test_wrapped_networks(wrapper):
    for said in wrapped(wrapper, ('fit','save')): assert any(o in said for o in known.get(wrapper, ())), said

@pytest.mark.slow
@wrappers
def test_what_every_wrapper_can_do(wrapper):
    for said in wrapped(wrapper, choices['verb']): assert any(o in said for o in known.get(wrapper, ())), said
