"kdfast's gradients against a loop written by hand, without hooks and without kdfast's losses"
from itertools import permutations
import pytest
from conftest import few_digits
from fastai.vision.all import *
from kdfast.all import *

names = ['group1','group2','group3']

@pytest.fixture
def dls(): return few_digits(size=32)  # AT weighs smaller maps less

def forward(net, x):
    "Logits and the outputs of the three groups"
    x,feats = net.stem(x),[]
    for n in names: feats.append(x := getattr(net, n)(x))
    return net.fc(net.flat(net.pool(net.act(net.bn(x.clone()))))),feats

def loss_by_hand(net, adapters, teacher, x, task):
    with torch.no_grad(): t_out,t_feats = forward(teacher, x)
    out,feats = forward(net, x)
    p,q = F.softmax(t_out/4, 1),F.softmax(out/4, 1)
    kd = 16*(p*(p.log()-q.log())).sum()/len(x)
    unit = lambda f: F.normalize((f**2).mean(1).flatten(1))
    at = sum(1000*((unit(s)-unit(t))**2).mean() for s,t in zip(feats, t_feats))
    hint = sum(100/3*((adapters[f'fitnet_{n}'](s)-t)**2).mean() for n,s,t in zip(names, feats, t_feats))
    return .1*task(out) + .9*kd + at + hint

by_weight = KD,partial(AT, weight=1e3),partial(FitNet, weight=100.)

class Capture(Callback):
    "Keep the networks as they are before the first batch, every batch, and the gradients of the first step"
    order = 40
    def __init__(self): self.batches,self.grads = [],None
    def before_train(self): self.net = deepcopy(self.learn.model)
    def before_backward(self):
        mix = getattr(self.learn, 'mix_up', None)
        self.batches.append((self.learn.xb[0].clone(), self.learn.yb[0].clone(), mix and (mix.yb1[0].clone(), mix.lam.clone())))
    def before_step(self):
        self.grads = {n:p.grad.clone() for n,p in self.learn.model.named_parameters()}
        raise CancelFitException

def task_of(y, mix):
    if mix is None: return lambda out: F.cross_entropy(out, y)
    y1,lam = mix
    return lambda out: (lam*F.cross_entropy(out, y, reduction='none') + (1-lam)*F.cross_entropy(out, y1, reduction='none')).mean()

def relative_error(terms, cbs, dls, teacher, quiet):
    capture = Capture()
    learn = distill_learner(dls, teacher, partial(wrn, 10, 1), cbs=[*terms, *cbs, capture], precision='float32')
    quiet(learn, 1, 1e-3)
    net,n = capture.net,sum(len(x) for x,*_ in capture.batches)
    teacher.eval()
    for x,y,mix in capture.batches: (loss_by_hand(net.model, net.adapters, teacher, x, task_of(y, mix))*len(x)/n).backward()
    ours,hand = (torch.cat([g[k].flatten() for k in capture.grads]) for g in (capture.grads, {k:p.grad for k,p in net.named_parameters()}))
    return ((ours-hand).norm()/hand.norm()).item(),len(capture.batches)

@pytest.mark.parametrize('order', list(permutations(by_weight)), ids=lambda o: '-'.join(getattr(c, 'func', c).__name__ for c in o))
@pytest.mark.parametrize('n_acc', [0,60])
def test_any_order_and_accumulation(order, n_acc, dls, teacher, quiet):
    cbs = [GradientAccumulation(n_acc)] if n_acc else []
    err,batches = relative_error([o() for o in order], cbs, dls, teacher, quiet)
    assert batches==(3 if n_acc else 1)
    assert err < 1e-5

@pytest.mark.parametrize('n_acc', [0,60])
def test_mixup(n_acc, dls, teacher, quiet):
    cbs = [MixUp(.4)] + ([GradientAccumulation(n_acc)] if n_acc else [])
    err,_ = relative_error([o() for o in by_weight], cbs, dls, teacher, quiet)
    assert err < 1e-5
