"What a learner tells of itself before it trains"
import pytest
from conftest import few_digits, n_hooks
from fastai.vision.all import *
from kdfast.all import *
from kdfast.layers.adapters import adapters_of
from kdfast.experiments.spec import methods, terms_of

@pytest.mark.parametrize('name', [o for o in methods() if o!='sigmoidkd'])
def test_every_method_shows_itself(name, trained):
    term, = terms_of(name)
    learn = distill_learner(few_digits(20, per_class=4), trained if term.taught else None, wrn(10, 1), cbs=term)
    rng,mode = torch.get_rng_state(),learn.model.training
    told,fig = learn.show_distill(),learn.show_pairs()
    lines = [o.split() for o in told.splitlines() if o.split()[:1]==[name]]
    pairs = {**term.layers, **({'output':'output'} if term.reads_logits or not term.layers else {})}  # exits are compared with the output
    for a,b in pairs.items(): assert any(a in o and (ifnone(b, 'output') in o or not term.taught) for o in lines)
    assert all(f'{count_params(m):,} parameters' in told for m in adapters_of(learn.model).values())
    assert len(lines)>=len(pairs) and ('none, no term' in told)!=term.taught
    boxes = {o.get_text().split('\n')[0] for o in fig.axes[0].texts}
    assert {'output',*term.layers} <= boxes and len(fig.axes[0].lines)==len(pairs)+1
    assert torch.equal(rng, torch.get_rng_state()) and learn.model.training==mode and not n_hooks(learn.model, trained)

def test_sizes_are_those_of_the_layers(teacher, dls):
    learn = distill_learner(dls, teacher, wrn(10, 1), cbs=[AT(), AT({'group2.0':'group3.0'}, weight=1e3)])
    *rest,own = [o.split() for o in learn.show_distill().splitlines()[-4:]]
    assert [o[0] for o in rest]==['at']*3 and own=='at_2 1,000 group2.0 32×8×8 group3.0 128×4×4'.split()

def test_networks_without_stages():
    "A vision transformer has no stages, and its logits are drawn all the same"
    torch.manual_seed(0)
    net = lambda d: nn.Sequential(nn.Flatten(), nn.Linear(3*16*16, d), nn.ReLU(), nn.Linear(d, 10))
    learn = distill_learner(few_digits(20, per_class=4), net(8), net(4))
    assert {o.get_text() for o in learn.show_pairs().axes[0].texts}=={'output\n10'} and 'kd' in learn.show_distill()
    for nets,named in ((net(8),net(4)),'the student'),((net(8),wrn(10, 1)),'the teacher'):
        with pytest.raises(ValueError, match=f'{named} has no convolutional stages: use KD'): distill_learner(few_digits(20, per_class=4), *nets, cbs=AT())

def test_a_learner_that_has_been_changed_shows_what_it_is_now(teacher, dls):
    learn = distill_learner(dls, teacher, wrn(10, 1))
    learn.add_cb(FitNet())
    assert 'fitnet' in learn.show_distill() and adapters_of(learn.model)
    with pytest.raises(ValueError, match='no teacher to compare with'): Learner(dls, wrn(10, 1)).show_pairs()

def test_loaders_hint_shadows_no_term(teacher, dls, quiet):
    "fastai warns of an attribute that hides one of the learner's"
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='You are shadowing')
        learn = distill_learner(dls, teacher, wrn(10, 1), cbs=[terms_of(n)[0] for n in ('kd','at','fitnet','dkd','vid')])
        quiet(learn, 1, 1e-3)
