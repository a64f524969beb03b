"Weight decay by compression"
import pytest
from fastai.vision.all import *
from kdfast.all import *
from kdfast.layers.adapters import adapters_of
from kdfast.train.decay import shares
from conftest import n_hooks

def hashed(ratio=.1): return wrn(10, 1, conv=partial(Hashed, ratio=ratio))

def decays(learn): return {round(h['wd'], 5) for h in learn.opt.hypers}

def test_every_parameter_decays_by_its_own_share(dls, quiet):
    "Without a gradient, AdamW multiplies by 1 - lr*wd*share: seen on the parameters themselves"
    class NoGradient(Callback):
        def before_step(self):
            for p in self.model.parameters(): p.grad.zero_()
    net = hashed(.2)
    before = {n:p.detach().clone() for n,p in net.named_parameters()}
    learn = wd_groups(distill_learner(dls, None, net, cbs=NoGradient()), wd=.5)
    learn.fit(1, 1e-2)
    n = len(dls.train)
    for k,p in net.named_parameters():
        share = net.get_submodule(k.rpartition('.')[0])
        c = share.compression if isinstance(share, Cheap) else 0 if k.endswith('bias') or isinstance(share, nn.BatchNorm2d) else 1
        assert torch.allclose(p, before[k]*(1-1e-2*.5*c)**n, atol=1e-6), k

def test_the_type_decides_not_the_name(dls, quiet):
    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.hashed_shuffle,self.plain,self.head = Full(3, 8),LowRank(8, 8, rank=1),nn.Linear(8, 10)
        def forward(self, x): return self.head(self.plain(self.hashed_shuffle(x)).mean((2,3)))
    net = Mine()
    share = shares(net)
    assert {n for n,p in net.named_parameters() if id(p) in share}=={'plain.0.weight','plain.1.weight','plain.2.weight'}
    assert {*share.values()}=={round((72+16)/576, 6)}

def test_base_value_again_at_ratio_1(dls, quiet):
    "A layer of each: the full one decays as if there were no groups"
    net = nn.Sequential(Hashed(3, 8, ratio=1.), nn.ReLU(), Hashed(8, 8, ratio=.5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    learn = wd_groups(Learner(dls, net), wd=.2)
    learn.fit(1)
    group = next(i for i,g in enumerate(learn.opt.param_lists) if any(p is net[0].weight for p in g))
    assert learn.opt.hypers[group]['wd']==.2 and decays(learn)=={.1,.2}

@pytest.mark.parametrize('wd,opt_func,base', [(None, Adam, .01), (.3, Adam, .3), (.3, partial(SGD, mom=.9), .3), (None, partial(Adam, wd=.04), .04)])
def test_base(dls, quiet, wd, opt_func, base):
    learn = wd_groups(Learner(dls, hashed(.1), opt_func=opt_func), wd=wd)
    learn.fit(1)
    assert max(decays(learn))==base and min(decays(learn))==pytest.approx(base*.1, rel=.01)
    learn.fit(1)
    assert max(decays(learn))==base and min(decays(learn))==pytest.approx(base*.1, rel=.01)
    learn.fit(1, wd=2*base)
    assert max(decays(learn))==2*base and min(decays(learn))==pytest.approx(base*.2, rel=.01)

def test_with_terms_adapters_and_blocks(dls, quiet, tmp_path):
    net,teacher = hashed(),wrn(10, 2)
    learn = wd_groups(distill_learner(dls, teacher, net, cbs=[KD(),FitNet()], path=tmp_path), wd=.1)
    learn.fit_one_cycle(1)
    assert len(decays(learn))>1 and any(p is q for p in learn.opt.param_lists[-1] for a in adapters_of(learn.model).values() for q in a.parameters())
    for mode in ('stagewise','parallel'):
        seen = []
        class See(Callback):
            def before_train(self): seen.append(decays(self.learn))
        learn.fit_blocks(1, mode=mode, cbs=See())
        assert all(max(o)==.1 for o in seen) and any(len(o)>1 for o in seen)
    learn.fit_one_cycle(1)
    again = load_learner(learn.export_student())
    assert torch.equal(again.model.fc.weight, net.fc.weight)

def test_save_and_load(dls, quiet, tmp_path):
    learn = wd_groups(Learner(dls, hashed(), path=tmp_path), wd=.1)
    learn.fit(1)
    learn.save('a')
    learn.load('a')
    learn.fit(1)
    assert len(decays(learn))>1

@pytest.mark.parametrize('fit,message', [(lambda l: l.fit_one_cycle(1, slice(1e-4, 1e-2)), r'one learning rate, got \[.*\]: pass a number'), (lambda l: l.fit(1, [1e-3]*3+[1e-2]), 'one learning rate'),
    (lambda l: l.fit(1, cbs=ParamScheduler({'wd':SchedLin(.1, .2)})), 'A schedule of wd overrides'), (lambda l: l.fine_tune(1), 'are not stages of the network')])
def test_what_would_undo_it(dls, quiet, fit, message):
    learn = wd_groups(Learner(dls, hashed()), wd=.1)
    with pytest.raises(ValueError, match=message): fit(learn)
    assert not n_hooks(learn.model)

def two_groups(m): return [[*m.stem.parameters()], [p for n,p in m.named_parameters() if not n.startswith('stem')]]

@pytest.mark.parametrize('make,message', [(lambda d: Learner(d, wrn(10, 1)), 'No layer of this network is compressed'), (lambda d: Learner(d, hashed(), opt_func=SGD), 'weight decay is 0'),
    (lambda d: Learner(d, hashed(), splitter=two_groups), 'in groups already'), (lambda d: wd_groups(Learner(d, hashed())), 'in groups already')])
def test_bad_input(dls, make, message):
    learn = make(dls)
    before = learn.splitter,learn.wd,[*learn.cbs]
    with pytest.raises(ValueError, match=message): wd_groups(learn)
    assert (learn.splitter,learn.wd,[*learn.cbs])==before
