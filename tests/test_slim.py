"Narrower students inside a student"
import pytest, timm, torchvision
from fastai.vision.all import *
from kdfast.all import *
from kdfast.compress.slim import Part
from kdfast.learner import accuracy_of
from conftest import few_digits, n_hooks, slow_but
from test_prune import lively

networks = {'wrn': (lambda: wrn(10, 1), 16), 'separable': (lambda: wrn(10, 2, conv=Separable), 16), 'resnet': (lambda: resnet(10, width=.25, stem='small'), 16),
    'mobile': (lambda: mobile(width=.5), 32), 'concatenated pools': (lambda: residual_cnn(), 32), 'plain': (lambda: plain_cnn(32, act=nn.ReLU), 32)}
slow = {'squeezenet': (lambda: torchvision.models.squeezenet1_1(num_classes=10), 64), 'mobilenetv3': (lambda: timm.create_model('mobilenetv3_small_050', num_classes=10), 64)}

def train_mode(net):
    "Batch norms in training mode, dropout off"
    for m in net.eval().modules(): m.training = isinstance(m, nn.BatchNorm2d)
    return net

@pytest.mark.parametrize('name', slow_but(*networks, of=[*networks,*slow]))
def test_a_part_is_the_network_that_is_cut_out(name):
    make,size = {**networks,**slow}[name]
    net = lively(make())
    part = Part(net, (torch.zeros(1,3,size,size),), .5, (), {})
    for p in net.parameters(): p.data += .1*torch.rand_like(p)  # the part follows
    x,now = torch.randn(8,3,size,size),Part(net, (torch.zeros(1,3,size,size),), .5, (), {}).net
    before = {k:v.clone() for k,v in net.state_dict().items()}
    with torch.no_grad(): ours,theirs = train_mode(part.net) and part(net, x),train_mode(now)(x)
    assert ((ours-theirs).norm()/theirs.norm()).item()<1e-5 and ours.std()>0
    assert count_params(now)<.6*count_params(net)
    assert all(torch.equal(before[k], v) for k,v in net.state_dict().items())

class Stop(Callback):
    "Keeps the batch and the gradients of the first step"
    order = 40
    def before_train(self): self.net = deepcopy(self.learn.student)
    def after_backward(self):
        self.batch = *(o.clone() for o in self.xb),*self.yb
        self.grads = {n:p.grad.clone() for n,p in self.learn.student.named_parameters()}
        raise CancelFitException

def by_hand(stop, teacher, widths, loss):
    "The gradient of the student and of a network at each width, which is cut out of it, copied back to where its weights came from"
    net,(x,y),grads = stop.net.train(),stop.batch,{}
    for w in widths:
        part = Part(net, (torch.zeros_like(x[:1]),), w, (), {}) if w<1 else None
        small = part.net.train() if part else deepcopy(net)
        loss(small(x), y, teacher(x).detach()).backward()
        for n,p in net.named_parameters():
            full = torch.zeros_like(p)
            if part: full[tuple(map(slice, small.get_parameter(n).shape))] = small.get_parameter(n).grad
            else: full = small.get_parameter(n).grad
            grads[n] = grads.get(n, 0) + full
    return grads

class Double(Transform):
    order = 200
    def encodes(self, x:TensorImage): return x.double()

@pytest.mark.parametrize('terms', ['kd', 'kd and dkd', 'alone', 'features'])
def test_gradients_are_those_of_all_widths(terms, dls, teacher, quiet):
    "In double precision: rounded otherwise, a ReLU near zero may pass its gradient on one side alone"
    dls.add_tfms([Double()], 'after_batch')
    teacher.double()
    made = dict(kd=[KD(T=2, alpha=.7)], alone=[], features=[AT(weight=10.)]).get(terms, [KD(T=2, alpha=.7), DKD(weight=.5, ramp=0.)])
    teacher.eval()
    kd,task = (lambda p, t, T: T**2*F.kl_div(F.log_softmax(p/T, 1), F.softmax(t/T, 1), reduction='batchmean')),CrossEntropyLossFlat()
    dkd = DKD().func
    taught = lambda p,y,t: .3*task(p, y) + .7*kd(p, t, 2.) + (.5*dkd(p, t, y=y) if terms=='kd and dkd' else 0)
    slim,stop = Slimmable(n=2),Stop()
    learn = quiet(distill_learner(dls, None if terms=='alone' else teacher, wrn(10, 1).double(), cbs=[*made, slim, stop], precision='float32'), 1)
    drawn = slim.drawn()
    assert len({*drawn})==3 and drawn[0]==.25 and max(drawn)<1
    if terms.startswith('kd'): expected = by_hand(stop, teacher, [1,*drawn], taught)
    else:
        whole = deepcopy(stop.net).train()(stop.batch[0]).detach()
        plain,bare = Stop(),by_hand(stop, lambda x: whole, drawn, lambda p,y,t: kd(p, t, 1.))
        set_seed(0)
        again = distill_learner(dls, None if terms=='alone' else teacher, deepcopy(stop.net), cbs=[*[AT(weight=10.)]*(terms=='features'), plain], precision='float32')
        with replaced_batch(again, stop.batch): quiet(again, 1)
        expected = {n:g+plain.grads[n] for n,g in bare.items()}
    for n,g in expected.items(): assert (stop.grads[n]-g).norm()<=1e-6*g.norm()+1e-9, n

@contextmanager
def replaced_batch(learn, batch):
    "The learner sees this batch first"
    class Same(Callback):
        order = -100
        def before_batch(self): self.learn.xb,self.learn.yb = batch[:1],batch[1:]
    with learn.added_cbs(Same()): yield

def test_accumulated_steps_are_one(dls, teacher, quiet):
    "Twice half of a gradient, added up, is the gradient"
    class Twice(Callback):
        order = -100
        def before_batch(self): self.learn.xb,self.learn.yb = stop.batch[:1],stop.batch[1:]
        def after_backward(self):
            if self.iter==1: self.learn.summed = {n:p.grad.clone() for n,p in self.learn.student.named_parameters()}; raise CancelFitException
    stop = Stop()
    quiet(distill_learner(dls, teacher, wrn(10, 1), cbs=[KD(), Slimmable(n=0), stop], precision='float32'), 1)
    learn = distill_learner(dls, teacher, deepcopy(stop.net), cbs=[KD(), Slimmable(n=0), GradientAccumulation(1000), Twice()], precision='float32')
    quiet(learn, 1)
    for n,g in stop.grads.items(): assert (learn.summed[n]/2*1000/dls.bs-g).norm()<=1e-4*g.norm()+1e-6, n

def test_the_whole_student_begins_the_same(dls, teacher, quiet):
    seen = []
    for cbs in ([],[Slimmable()]):
        set_seed(0)
        dls.train.rng.seed(0)
        stop = Stop()
        quiet(distill_learner(dls, teacher, wrn(10, 1), cbs=[KD(), stop, *cbs]), 1)
        seen.append((stop.batch[0], {**stop.net.state_dict()}))
    (x,a),(z,b) = seen
    assert torch.equal(x, z) and all(torch.equal(a[k], b[k]) for k in a)

@pytest.fixture(scope='module')
def slimmed(trained):
    dls = few_digits(64, per_class=40, valid=200)
    set_seed(0)
    learn = distill_learner(dls, trained, wrn(10, 1), cbs=[KD(), Slimmable(round_to=2)], metrics=accuracy)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(8, 1e-2)
    return learn

@pytest.mark.slow
def test_every_width_learns(slimmed):
    accs = {w: accuracy_of(slimmed.narrow(w), slimmed.dls) for w in (.25,.5,.75,1)}
    assert accs[.5]>.4 and accs[.75]>.4 and accs[.25]>.2 and accs[1]==pytest.approx(slimmed.validate()[1])
    assert n_hooks(slimmed.student)==0 and slimmed.student.training==slimmed.model.training

def test_a_width_is_the_part_that_was_trained(slimmed):
    x,net = slimmed.dls.one_batch()[0],slimmed.narrow(.25)
    assert not net.training
    part = slimmed.slimmable.parts[.25]
    with torch.no_grad(): assert torch.allclose(net.train()(x), part(slimmed.student, x), atol=1e-5)
    assert all(c%2==0 for c in (m.out_channels for m in net.modules() if isinstance(m, nn.Conv2d)))

def test_its_statistics_are_those_of_the_batches(slimmed):
    net,again = slimmed.narrow(.5, n=2),slimmed.narrow(.5, n=1000)
    a,b = (o.group3[0].bn1.running_var for o in (net,again))
    assert net.group3[0].bn1.num_batches_tracked==2 and again.group3[0].bn1.num_batches_tracked==len(slimmed.dls.train)
    assert not torch.equal(a, b) and torch.isfinite(a).all() and net.group3[0].bn1.momentum==.1

def test_budgets(slimmed):
    whole = slimmed.student
    for unit,count,budget in (('params',count_params,20_000), ('macs',lambda m: count_macs(m, 16),800_000)):
        net = slimmed.narrow(**{unit:budget})
        assert .7*budget<count(net)<=budget<count(whole)
    timed = lambda net,size: count_params(net)/1000 if size==(3,16,16) else 1e9
    assert 14<count_params(slimmed.narrow(ms=20, runtime=timed))/1000<=20
    with pytest.raises(ValueError, match='out of reach'): slimmed.narrow(params=100)
    assert count_params(slimmed.narrow(params=10**6))==count_params(slimmed.narrow(ms=1e6, runtime=timed))==count_params(whole)

def test_one_width_is_an_ordinary_network(slimmed, tmp_path):
    net = slimmed.narrow(.5)
    learn = Learner(slimmed.dls, net, metrics=accuracy, path=tmp_path)
    right = learn.validate()[1]
    learn.export('half.pkl')
    assert load_learner(tmp_path/'half.pkl').model.group1[0].conv1.out_channels==8 and right==pytest.approx(accuracy_of(net, slimmed.dls))
    net.stem.weight.data.zero_()
    assert slimmed.student.stem.weight.abs().sum()>0

def test_a_learner_with_it_is_exported(slimmed, tmp_path):
    slimmed.path = tmp_path
    slimmed.export('whole.pkl')
    assert (tmp_path/'whole.pkl').stat().st_size<2*4*count_params(slimmed.student)+200_000
    loaded = load_learner(tmp_path/'whole.pkl')
    with pytest.raises(ValueError, match='any batches'): loaded.narrow(.5)
    loaded.dls = slimmed.dls
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='Slimmable')
        assert count_params(loaded.narrow(.5))==count_params(slimmed.narrow(.5))

@pytest.mark.parametrize('kwargs,match', [(dict(smallest=0),'between 0 and 1'), (dict(smallest=1.),'between 0 and 1'), (dict(smallest=float('nan')),'between 0 and 1'), (dict(n=12),'0 to 11'), (dict(n=-1),'0 to 11')])
def test_bad_settings(kwargs, match):
    with pytest.raises(ValueError, match=match): Slimmable(**kwargs)

@pytest.mark.parametrize('cbs,match', [([KD(),Slimmable(smallest=.01)],'would leave none'), ([DKD(share=.3),Slimmable()],'pass a weight'), ([KD(),Slimmable(keep=['nowhere'])],'nowhere'), ([KD(),Slimmable(odd=1)],'Unknown option odd')])
def test_what_cannot_be_trained_is_refused_first(cbs, match, dls, teacher, quiet):
    learn = distill_learner(dls, teacher, wrn(10, 1), cbs=cbs)
    before = {k:v.clone() for k,v in learn.student.state_dict().items()}
    with pytest.raises(ValueError, match=match): quiet(learn, 1)
    assert n_hooks(learn.student)==0 and all(torch.equal(before[k], v) for k,v in learn.student.state_dict().items())
    learn.remove_cb(Slimmable)
    quiet(learn, 1)

def numbers():
    x = torch.randn(40,3,16,16)
    return DataLoaders.from_dsets(*[[*zip(x, x.mean((1,2,3))[:,None])]]*2, bs=10)

@pytest.mark.slow
@pytest.mark.parametrize('cbs', [[], [Logits()]])
def test_outputs_that_are_no_classes_learn_from_labels(cbs, quiet):
    "Softmax of one output would be constant"
    for t in cbs: t.weight = phased(1., until=.4)
    learn = distill_learner(numbers(), wrn(10, 1, n_out=1) if cbs else None, wrn(10, 1, n_out=1), loss_func=MSELossFlat(), cbs=[*cbs, Slimmable()])
    losses = []
    learn.slimmable.loss_at = lambda w: losses.append((learn.pct_train, Slimmable.loss_at(learn.slimmable, w))) or losses[-1][1]
    assert count_params(quiet(learn, 2).narrow(.5))<count_params(learn.student)/3
    assert all(o>1e-6 for _,o in losses) and len(losses)==24

def test_classes_along_another_axis(quiet):
    class Seq(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b = nn.Linear(4, 16),nn.Linear(16, 5)
        def forward(self, x): return self.b(F.relu(self.a(x)))
    x = torch.randn(40,7,4)
    dls = DataLoaders.from_dsets(*[[*zip(x, torch.randint(5, (40,7)))]]*2, bs=10)
    learn = Learner(dls, Seq(), CrossEntropyLossFlat(), cbs=Slimmable())
    seen = []
    learn.slimmable.loss_at = lambda w: seen.append((Slimmable.loss_at(learn.slimmable, w), learn.pred, learn.slimmable.parts[w](learn.student, *learn.xb))) or seen[-1][0]
    loss,whole,part = first(quiet(learn, 1) and seen)
    expected = F.kl_div(part.log_softmax(2), whole.softmax(2), reduction='none').sum(2).mean()
    assert loss.item()==pytest.approx(expected.item(), rel=1e-4)

def test_parts_follow_changed_layers(dls, teacher, quiet):
    "Layers, settings or device may change between fits, and no parameter with them"
    slim = Slimmable()
    learn = quiet(distill_learner(dls, teacher, wrn(10, 1), cbs=[KD(), slim]), 1)
    kept = slim.parts
    assert quiet(learn, 1).slimmable.parts is kept
    learn.student.act = nn.Tanh()
    assert quiet(learn, 1).slimmable.parts is not kept and isinstance(slim.parts[.25].net.act, nn.Tanh)
    slim.keep = ['stem']
    assert quiet(learn, 1).narrow(.25).stem.out_channels==16==slim.parts[.25].net.stem.out_channels
    assert all(p.is_meta for p in slim.parts[.25].net.parameters())

def test_the_first_of_two_stages_is_the_whole_students(dls, teacher, quiet):
    learn = distill_learner(dls, teacher, wrn(10, 1), cbs=[KD(), FitNet(), Slimmable()])
    before,called = learn.student.fc.weight.clone(),[]
    learn.slimmable.loss_at = lambda w: called.append(learn.fitnet.stage) or Slimmable.loss_at(learn.slimmable, w)
    quiet(learn, 1, 1, how='fit_two_stages')
    assert {*called}=={2} and not torch.equal(before, learn.student.fc.weight)

def test_block_by_block_is_refused(dls, teacher, quiet):
    learn = distill_learner(dls, teacher, wrn(10, 1), cbs=[KD(), Slimmable()])
    with pytest.raises(ValueError, match='not block by block'): quiet(learn, 1, how='fit_blocks')
    assert n_hooks(learn.student)==0 and all(p.requires_grad for p in learn.student.parameters())

def test_labels_count_as_in_the_whole(dls, teacher, quiet):
    "SimKD takes them out"
    learn = distill_learner(dls, teacher, wrn(10, 1), cbs=[SimKD(), KD(alpha=.5), Slimmable()])
    seen = []
    def both(w):
        if learn.iter==0: seen.append([Slimmable.loss_at(learn.slimmable, w) for learn.yb in (learn.yb,((learn.y+1)%10,))])
        return Slimmable.loss_at(learn.slimmable, w)
    learn.slimmable.loss_at = both
    quiet(learn, 1)
    assert seen and all(a.item()==pytest.approx(b.item(), rel=1e-4) for a,b in seen)

def test_several_inputs(quiet):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b,self.c = nn.Linear(8, 16),nn.Linear(8, 16),nn.Linear(16, 3)
        def forward(self, x, z): return self.c(F.relu(self.a(x)+self.b(z)))
    x = torch.randn(40, 8)
    dls = DataLoaders.from_dsets(*[[*zip(x, -x, torch.randint(3, (40,)))]]*2, bs=10)
    learn = quiet(Learner(dls, Two(), CrossEntropyLossFlat(), cbs=Slimmable()), 1)
    assert count_macs(learn.narrow(macs=200), tuple(o[:1] for o in dls.one_batch()[:2]))<=200

@pytest.mark.parametrize('kwargs,match', [(dict(width=.1),'choose one of these'), (dict(width=1.5),'choose one of these'), (dict(),'exactly one'), (dict(width=.5, params=10),'exactly one'), (dict(width=.5, n=0),'no training batch')])
def test_bad_widths(slimmed, kwargs, match):
    with pytest.raises(ValueError, match=match): slimmed.narrow(**kwargs)

def test_other_students_have_no_widths(dls):
    with pytest.raises(ValueError, match='learn.prune'): Learner(dls, wrn(10, 1)).narrow(.5)

def test_widths_that_nothing_has_trained(dls, quiet, recwarn):
    learn = distill_learner(dls, None, wrn(10, .5), cbs=Slimmable())
    with pytest.warns(UserWarning, match='trained nothing in this learner: fit it first'): learn.narrow(.5)
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=12, show_plot=False)
    with pytest.warns(UserWarning, match='trained nothing'): learn.narrow(.5)
    recwarn.clear()
    quiet(learn, 1).narrow(.5)
    assert not [o for o in recwarn if 'trained nothing' in str(o.message)]

def test_a_student_that_is_pruned_between_fits(dls, teacher, quiet):
    learn = quiet(distill_learner(dls, teacher, wrn(10, 1), cbs=[KD(), Slimmable()]), 1)
    learn.prune(.5)
    part = quiet(learn, 1).slimmable.parts[.25]
    assert count_params(part.net)==count_params(learn.narrow(.25))<count_params(learn.student)/4

def test_mixed_images_and_precision(dls, teacher, quiet):
    learn = quiet(distill_learner(dls, teacher, wrn(10, 1), cbs=[KD(), Slimmable(), MixUp(), BF16()]), 1)
    assert all(p.isfinite().all() for p in learn.student.parameters())
    assert learn.narrow(.5)(dls.one_batch()[0]).dtype==torch.float32
