"A teacher asked as a copy says what the teacher says, costs less, and leaves the teacher as it is"
import pytest
from conftest import few_digits, n_hooks
from fastai.vision.all import *
from kdfast.all import *
from kdfast.core import fingerprint
from kdfast.data.memory import TensorDL
from kdfast.teacher.inference import fold_norms
from kdfast.devices import LoaderHint, native_bf16

pytestmark = pytest.mark.usefixtures('native')
x32 = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))

def moved(net):
    "With statistics such as training leaves"
    g = torch.Generator().manual_seed(0)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.copy_(torch.randn(m.num_features, generator=g))
            m.running_var.copy_(torch.rand(m.num_features, generator=g)+.5)
            m.weight.data.copy_(torch.rand(m.num_features, generator=g)+.5)
    return net.eval()

def far(a, b): return ((a.float()-b.float()).norm()/b.float().norm()).item()

def norms(net): return sum(isinstance(m, nn.BatchNorm2d) for m in net.modules())

def same(net, xb=(x32,), taps=()):
    "How many norms are left, after what it says has been compared"
    folded = fold_norms(net, xb, taps)
    with torch.no_grad(): assert far(folded(*xb), deepcopy(net).eval()(*xb))<1e-4
    return norms(folded)

# Folding

class Block(nn.Module):
    "Its forward is `how`"
    def __init__(self, how):
        super().__init__()
        self.how = (how,)
        self.a,self.n,self.b,self.m = nn.Conv2d(3, 4, 3, padding=1),nn.BatchNorm2d(4),nn.Conv2d(4, 4, 3, padding=1),nn.BatchNorm2d(4)
    def forward(self, x): return self.how[0](self, x)

hows = dict(straight=(lambda s,x: s.m(s.b(s.n(s.a(x)))), 0), read_twice=(lambda s,x: s.m(s.b(s.n(a:=s.a(x))))+a, 1), read_by_a_product=(lambda s,x: s.n(a:=s.a(x))*a.mean((2,3), keepdim=True), 2),
    detached=(lambda s,x: s.n(a:=s.a(x))+a.detach(), 2), norm_twice=(lambda s,x: s.n(s.a(x))+s.n(x.repeat(1,2,1,1)[:,:4]), 2), conv_twice=(lambda s,x: s.n(s.a(x))+s.m(s.a(2*x)), 2),
    relu_between=(lambda s,x: s.n(s.a(x).relu()), 2), viewed=(lambda s,x: s.n(s.a(x).flatten(2).view(len(x), 4, *x.shape[2:])), 2), in_place=(lambda s,x: s.n(s.a(x)).relu_()+s.b(s.a(x)).relu_(), 2))

@pytest.mark.parametrize('name', hows)
def test_norms_are_folded_only_where_that_is_exact(name):
    how,left = hows[name]
    assert same(moved(Block(how)))==left

def test_what_data_hides_is_found_by_comparing():
    "No operation is seen to read `a.data`"
    net = moved(Block(lambda s,x: s.n(a:=s.a(x))+3*a.data))
    assert same(net)==2

def test_norms_with_hooks_of_their_own_and_without_statistics():
    hooked,bare = moved(Block(hows['straight'][0])),moved(Block(hows['straight'][0]))
    hooked.a.register_forward_hook(lambda m,i,o: 2*o)
    bare.n = nn.BatchNorm2d(4, track_running_stats=False)
    assert same(hooked)==1 and same(bare)==1

@pytest.mark.parametrize('make,left', [(partial(resnet, 10),0), (partial(wrn, 16, 2),6), (partial(wrn, 16, 2, conv=Separable),6), (partial(wrn, 16, 2, conv=partial(Hashed, ratio=.5)),12), (mobile,0)])
def test_norms_of_our_networks(make, left): assert same(moved(make()), (torch.randn(2, 3, 64, 64),))==left

# The copy

@pytest.mark.parametrize('precision,tol', [('float32',1e-4),('auto',.05),(None,1e-6)])
def test_answers(precision, tol, teacher):
    names = ['group1','group2','group3']
    moved(teacher)
    with torch.no_grad(), Taps(teacher, names) as t: exact = teacher(x32),dict(t.outs)
    teacher.train()
    out,maps = Frozen(teacher, (x32[:2],), names, precision=precision)(x32)
    assert far(out, exact[0])<tol and all(far(maps[n], exact[1][n])<tol for n in names) and teacher.training and n_hooks(teacher)==0

@pytest.mark.slow
def test_compiled_and_short(teacher):
    exact,frozen = (Frozen(teacher, (x32[:2],), ['group1','group2'], outputs=False, precision='float32', compile=o) for o in (False,True))
    (none,theirs),(nothing,ours) = exact(x32),frozen(x32)
    assert none is nothing is None and all(far(ours[n], theirs[n])<1e-3 for n in theirs)

def test_a_layer_that_is_called_twice_is_refused_but_before_a_relu():
    "What a layer takes, ':in', counts with its last call, which blocks that share a ReLU need; nothing is then cut off before it"
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b = nn.Conv2d(3, 3, 1),nn.Conv2d(3, 3, 1)
        def forward(self, x): return self.a(self.b(self.a(x)))
    net = Twice().eval()
    with pytest.raises(ValueError, match="The layer 'a' is called more than once"): Frozen(net, (x32[:2],), ['a','b'], outputs=False, precision='float32')
    _,maps = Frozen(net, (x32[:2],), ['a:in','b'], outputs=False, precision='float32')(x32)
    with torch.no_grad(): assert far(net.a(maps['a:in']), net(x32))<1e-5

def test_double_stays(teacher):
    out,_ = Frozen(teacher.double(), (x32[:2].double(),))(x32.double())
    assert out.dtype==torch.float64

@pytest.mark.parametrize('precision,match', [('fp16','does not compute fp16'),('half','precision must be'),('int4','precision must be')])
def test_precision_that_cannot_be(precision, match, dls, teacher):
    with pytest.raises(ValueError, match=match): distill_learner(dls, teacher, wrn(10, 1), precision=precision)

def test_bf16_where_it_is_not_native(dls, teacher, monkeypatch):
    monkeypatch.setenv('KDFAST_NATIVE_BF16', '0')
    with pytest.raises(ValueError, match="use precision='auto'"): distill_learner(dls, teacher, wrn(10, 1), precision='bf16')
    frozen = Frozen(teacher, (x32[:2],))
    assert frozen.dtype==torch.float32 and frozen(x32)[0].dtype==torch.float32
    with torch.autocast('cpu', torch.bfloat16): assert frozen(x32)[0].dtype==torch.float32  # a student in bfloat16 does not slow the teacher down
    with pytest.warns(UserWarning, match='only emulates bfloat16'): distill_learner(dls, teacher, wrn(10, 1)).to_bf16()

# In a learner

@pytest.mark.parametrize('precision', ['float32','auto',int8_teacher,None])
@pytest.mark.parametrize('bf16', [False,True])
def test_the_teacher_is_as_it_was(precision, bf16, dls, teacher, quiet):
    state,ids = {k:v.clone() for k,v in teacher.state_dict().items()},[*map(id, teacher.parameters())]
    teacher.group2.eval()
    modes = [m.training for m in teacher.modules()]
    learn = distill_learner(dls, teacher, wrn(10, 1), cbs=[KD(), AT(), FitNet()], precision=precision)
    quiet(learn.to_bf16() if bf16 else learn, 2, 1e-3)
    assert all(torch.equal(v, state[k]) for k,v in teacher.state_dict().items()) and ids==[*map(id, teacher.parameters())]
    assert modes==[m.training for m in teacher.modules()] and all(p.requires_grad and p.grad is None for p in teacher.parameters()) and n_hooks(teacher, learn.student)==0
    assert all(p.dtype==torch.float32 and p.is_contiguous() for p in teacher.parameters())
    assert all(v>0 for v in learn.recorder.values[-1])

class Keep(Callback):
    "The gradients of the first step"
    def before_step(self):
        self.grads = torch.cat([p.grad.flatten() for p in self.learn.student.parameters()])
        raise CancelFitException

@pytest.mark.parametrize('precision,tol', [('auto',.05),(int8_teacher,.3)])
def test_gradients_differ_by_rounding(precision, tol, dls, quiet, native):
    teacher,student = wrn(10, 2),wrn(10, 1)
    quiet(Learner(dls, teacher), 2, 1e-2)
    def grads(p):
        set_seed(0)
        keep = Keep()
        dls.train.rng.seed(0)
        quiet(distill_learner(dls, teacher, deepcopy(student), cbs=[KD(), AT(), keep], precision=p), 1)
        return keep.grads
    assert (far(grads(precision), grads('float32'))>0)==(native or precision is int8_teacher) and far(grads(precision), grads('float32'))<tol

def test_weights_that_fastai_changes_are_seen(dls, teacher, quiet):
    "Its optimizers write to `p.data`, which no version counter tells"
    learn = distill_learner(dls, teacher, wrn(10, 1), precision='float32')
    quiet(learn, 1, 1e-3)
    copy = learn.teacher.frozen
    quiet(Learner(dls, teacher, opt_func=SGD), 1, 1e-1)
    quiet(learn, 1, 1e-3)
    x = dls.valid.one_batch()[0]
    assert learn.teacher.frozen is not copy
    with torch.no_grad(): assert far(learn.teacher.frozen(x)[0], teacher.eval()(x))<1e-3

def test_a_teacher_that_changes_while_it_teaches(dls, quiet):
    "An average of the student's weights, asked as it is"
    student = wrn(10, 1)
    average = deepcopy(student)
    class Follow(Callback):
        outs = []
        def after_step(self):
            for a,p in zip(average.parameters(), self.learn.student.parameters()): a.data.lerp_(p.data, .5)
        def after_loss(self):
            if self.training: self.outs.append(self.learn.teacher.out.sum().item())
    class Now(Callback):
        order = 60
        gaps = []
        def after_pred(self):
            if self.training:
                with torch.no_grad(): self.gaps.append(far(self.learn.teacher.out, deepcopy(average).eval()(self.x)))
    now = Now()
    quiet(distill_learner(dls, average, student, cbs=[Follow(),now], precision=None), 2, 1e-2)
    assert len(now.gaps)==2*len(dls.train) and max(now.gaps)<1e-5

def counted(net):
    calls = []
    net.register_forward_hook(lambda m,i,o: calls.append(len(i[0])) if len(i[0])>2 else None)
    return calls

@pytest.mark.parametrize('terms,group3,fc', [([AT],True,False), ([partial(AT, {'group1':'group1'})],False,False), ([KD,AT],True,True), ([FitNet],True,False)])
def test_no_deeper_than_it_is_read(terms, group3, fc, dls, teacher, quiet):
    deep,end = counted(teacher.group3),counted(teacher.fc)
    quiet(distill_learner(dls, teacher, wrn(10, 1), cbs=[t() for t in terms]), 1, 1e-3)
    assert bool(deep)==group3 and bool(end)==fc

@pytest.mark.parametrize('terms', [[AT(weight=0.)], [KD(alpha=0.)], [KD(alpha=0.), FitNet(weight=0.)]], ids=['AT','KD','KD+FitNet'])
def test_no_weight_no_cost(terms, dls, teacher, quiet):
    calls = counted(teacher.stem)
    def fit(t, cbs):
        set_seed(0)
        dls.train.rng.seed(0)
        student = wrn(10, 1)
        learn = quiet(distill_learner(dls, t, student, cbs=cbs), 1, 1e-3)
        assert n_hooks(student)==0
        return learn
    alone,learn = fit(None, None),fit(teacher, terms)
    assert not calls and all(torch.equal(a, b) for a,b in zip(alone.student.parameters(), learn.student.parameters()))
    assert all(learn.recorder.history[t.label].iloc[0]==0 for t in learn.teacher.terms)

def test_a_schedule_switches_the_teacher_on(dls, teacher, quiet):
    calls = counted(teacher.stem)
    learn = distill_learner(dls, teacher, wrn(10, 1), cbs=AT(weight=lambda pct: 1e3*(pct>=.5)))
    quiet(learn, 2, 1e-3)
    assert len(calls)==len(dls.train) and learn.recorder.history['at'].iloc[0]==0<learn.recorder.history['at'].iloc[1]

def test_int8_needs_a_cpu_and_one_input(dls, teacher):
    learn = distill_learner(dls, teacher, wrn(10, 1), precision=int8_teacher)
    learn.teacher.plan.xb = tuple(o.to('meta') for o in learn.teacher.plan.xb)
    with pytest.raises(ValueError, match='needs one input on a CPU'): learn.teacher.freeze([], device='meta')

def test_int8_reads_the_layer_that_is_named(dls, quiet):
    "A stage and its first block, one in the other"
    teacher = moved(wrn(16, 2))
    learn = distill_learner(dls, teacher, wrn(16, 1), cbs=AT(per_stage=2), precision=int8_teacher)
    names,x = sorted(learn.at.layers.values()),dls.valid.one_batch()[0].as_subclass(Tensor)
    _,ours = learn.teacher.freeze(names)(x)
    _,theirs = Frozen(teacher, (x[:2],), names, precision='float32')(x)
    gaps = {n:far(ours[n], theirs[n]) for n in names}
    assert len(names)==6 and max(gaps.values())<.5<min(far(theirs[f'{n}.0'], theirs[n]) for n in ('group2','group3')), gaps

@pytest.mark.slow
@pytest.mark.parametrize('mode', ['stagewise','parallel'])
def test_int8_gives_hints_to_blocks(mode, dls, teacher, quiet):
    learn = distill_learner(dls, teacher, wrn(10, 1), precision=int8_teacher)
    run = quiet(learn, 1, head=1, how='fit_blocks', mode=mode)
    assert learn.recorder.values and n_hooks(teacher)==0

# Inputs and networks of other kinds

def test_a_network_that_wants_its_images_in_one_order():
    "`view` after a convolution does not take channels-last maps"
    class Lenet(nn.Sequential):
        def forward(self, x): return self[1](self[0](x).view(len(x), -1))
    net = Lenet(nn.Conv2d(3, 4, 5, 4), nn.Linear(196, 10)).eval()
    for precision in ('auto','float32'):
        frozen = Frozen(net, (x32[:2],), precision=precision)
        assert frozen.own and not frozen.last
        with torch.no_grad(): assert far(frozen(x32)[0], net(x32))<.05

@pytest.mark.parametrize('precision', ['float32',None])
def test_images_that_do_not_lie_in_order(precision, teacher):
    moved(teacher)
    wide = torch.randn(8, 3, 40, 40)
    frozen = Frozen(teacher, (x32[:2],), precision=precision)
    for x in (wide[..., :32, :32], wide[..., 4:36, 4:36].permute(0,1,3,2), x32.contiguous(memory_format=torch.channels_last)):
        with torch.no_grad(): assert far(frozen(x)[0], teacher(x))<1e-4

def test_another_forward_is_another_network(teacher):
    other = deepcopy(teacher)
    other.act = nn.GELU()
    assert fingerprint(other)!=fingerprint(teacher)==fingerprint(deepcopy(teacher))

def test_a_loaded_learner_can_be_copied(dls, teacher, quiet, tmp_path):
    learn = distill_learner(dls, teacher, wrn(10, 1), path=tmp_path, precision='float32')
    learn.export()
    back = deepcopy(load_learner(tmp_path/'export.pkl'))
    assert back.teacher.network is None and deepcopy(learn).teacher.network is teacher and deepcopy(learn).teacher.precision=='float32'

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_on_a_gpu(teacher, quiet):
    dls = few_digits(20, per_class=8, device='cuda')
    learn = quiet(distill_learner(dls, teacher, wrn(10, 1), cbs=[KD(), AT(), FitNet()]), 1, 1e-3)
    assert next(teacher.parameters()).device.type=='cpu' and learn.teacher.frozen.dtype==(torch.bfloat16 if native_bf16(torch.device('cuda')) else None)

# The loader

class Slow(Transform):
    def encodes(self, x:int):
        time.sleep(.004)
        return torch.randn(3, 8, 8)

def said(dls, n=2):
    learn = distill_learner(dls, None, nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), loss_func=CrossEntropyLossFlat())
    with warnings.catch_warnings(record=True) as w, learn.no_bar(), learn.no_logging():
        warnings.simplefilter('always')
        learn.fit(n, 1e-3)
        learn.fit(1, 1e-3)
    return [str(o.message) for o in w if 'waits for its images' in str(o.message)]

@pytest.mark.slow
@pytest.mark.parametrize('workers', [0,1])
def test_a_slow_loader_is_named_once(workers):
    dls = Datasets([*range(64)], [Slow(), [lambda i: tensor(i%2)]]).dataloaders(bs=8, num_workers=workers, device='cpu')
    hint, = said(dls)
    rate = float(hint.split('yields ')[1].split(' ')[0].replace(',', ''))
    assert 0<rate<260 and 'in_memory=True' in hint

def test_a_loader_in_memory_is_not(dls):
    learn = distill_learner(dls, None, nn.Sequential(nn.Flatten(), nn.Linear(768, 10)))
    with warnings.catch_warnings(), learn.no_bar(), learn.no_logging():
        warnings.simplefilter('error')
        learn.fit(2, 1e-3)
    assert isinstance(dls.train, TensorDL) and learn.loader_hint.told is False
