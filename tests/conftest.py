"Small networks and data that the tests share"
import functools, matplotlib, pytest, warnings
matplotlib.use('Agg')
from contextlib import ExitStack
from fastai.vision.all import *
from kdfast.all import *
from torch.onnx._internal.exporter._registration import ONNXRegistry
from torch.utils._python_dispatch import TorchDispatchMode

ONNXRegistry.from_torchlib = staticmethod(functools.cache(ONNXRegistry.from_torchlib))  # read anew for each export, half a second

def pytest_collection_modifyitems(items):
    "fastai's star import brings fastcore's `test_eq` and the like, which are no tests"
    items[:] = [i for i in items if i.function.__module__==i.module.__name__]

seconds = Counter()

def pytest_runtest_logreport(report):
    "A run that is cut off tells what had failed"
    seconds[report.nodeid.split('::')[0]] += report.duration
    if report.failed: print(f"\nFAILED {report.nodeid}: {report.longreprtext.splitlines()[-1]}", flush=True)

def pytest_terminal_summary(terminalreporter):
    "The files that take longest, so that none grows unseen"
    if sum(seconds.values())>60: terminalreporter.write_line('Seconds by file: ' + ', '.join(f'{k} {v:.0f}' for k,v in seconds.most_common(30)))

@pytest.fixture(autouse=True)
def _seed():
    set_seed(0)
    yield
    plt.close('all')

def slow_but(*quick, of):
    "Parameters `of` a test, of which `make test` runs those in `quick`, and `make test-all` all"
    assert {*quick}<={*of}
    return [o if o in quick else pytest.param(o, marks=pytest.mark.slow) for o in of]

def few_digits(bs=20, per_class=8, size=16, valid=60, **kwargs):
    "Few small digits to train on, and to validate on: all 599 at 32 px would take longer than the training"
    return digits_dls(bs, per_class=per_class, size=size, valid=valid, **kwargs)

@pytest.fixture
def dls(): return few_digits()

@pytest.fixture
def teacher(): return wrn(10, 2)

@pytest.fixture(scope='module')
def trained():
    "A teacher of 98 % on digits of 16 px"
    net = wrn(10, 2)
    net.load_state_dict(torch.load(Path(__file__).parent.parent/'results/teachers/digits-wrn-10-2-1f799070ccb7.pth')['weights'])
    return net

@pytest.fixture(params=['0','1'], ids=['emulated','native'])
def native(request, monkeypatch):
    "Whether bfloat16 is taken to be native, whatever this processor has: both, one after the other"
    monkeypatch.setenv('KDFAST_NATIVE_BF16', request.param)
    return request.param=='1'

@pytest.fixture
def quiet():
    "Fit a learner without bars or lines"
    def fit(learn, *args, how='fit', **kwargs):
        with learn.no_bar(), learn.no_logging(): getattr(learn, how)(*args, **kwargs)
        return learn
    return fit

def n_hooks(*models): return sum(len(m._forward_hooks)+len(m._forward_pre_hooks) for net in models for m in net.modules())

class Waits(TorchDispatchMode):
    "Counts the operations whose result a GPU must have computed before Python goes on: numbers that are read, shapes that depend on values"
    n,reads = 0,('_local_scalar_dense','nonzero','masked_select','equal','_unique2')
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split('.')[0]
        masked = name in ('index','index_put_','index_put') and any(o is not None and o.dtype==torch.bool for o in args[1])
        self.n += name in self.reads or masked
        return func(*args, **(kwargs or {}))

class _ThirdStep(Callback):
    "Watches the third step, from the loader on"
    order,run_valid = 1000,False
    def __init__(self): self.stack,self.waits,self.seen = ExitStack(),Waits(),[]
    def after_batch(self):
        if self.iter==1 and torch.cuda.is_available():
            self.seen = self.stack.enter_context(warnings.catch_warnings(record=True))
            warnings.simplefilter('always')
            torch.cuda.set_sync_debug_mode('warn')
            self.stack.callback(torch.cuda.set_sync_debug_mode, 'default')
        if self.iter==1: self.stack.enter_context(self.waits)
        if self.iter==2: raise CancelFitException

def waits_of(learn):
    "How often a GPU waits in one step, counted there by torch itself"
    watch = _ThirdStep()
    try:
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3, cbs=watch)
    finally: watch.stack.close()
    return sum('called a synchronizing CUDA operation' in str(o.message) for o in watch.seen) if torch.cuda.is_available() else watch.waits.n
