"Small networks and data that the tests share"
import matplotlib, pytest
matplotlib.use('Agg')
from fastai.vision.all import *
from kdfast.all import *

def pytest_collection_modifyitems(items):
    "fastai's star import brings fastcore's `test_eq` and the like, which are no tests"
    items[:] = [i for i in items if i.function.__module__==i.module.__name__]

@pytest.fixture(autouse=True)
def _seed():
    set_seed(0)
    yield
    plt.close('all')

@pytest.fixture
def dls(): return digits_dls(20, per_class=8)

@pytest.fixture
def teacher(): return wrn(10, 2)

@pytest.fixture(scope='module')
def trained():
    "A teacher that says something"
    set_seed(0)
    learn = Learner(digits_dls(32, per_class=32), wrn(10, 2))
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(2, 1e-2)
    return learn.model

@pytest.fixture
def quiet():
    "Fit a learner without bars or lines"
    def fit(learn, *args, how='fit', **kwargs):
        with learn.no_bar(), learn.no_logging(): getattr(learn, how)(*args, **kwargs)
        return learn
    return fit

def n_hooks(*models): return sum(len(m._forward_hooks)+len(m._forward_pre_hooks) for net in models for m in net.modules())
