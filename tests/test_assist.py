"Chains of teachers, and teachers that vote"
import pytest
from fastai.vision.all import *
from kdfast.all import *
from kdfast.teacher.source import teacher_of

def counted(net):
    calls = []
    net.register_forward_hook(lambda m,i,o: calls.append(m.training) if len(i[0])>2 else None)  # not the probes of two images
    return calls

def test_each_link_is_taught_by_the_one_before(dls, teacher, quiet):
    assistant,student,seen = wrn(10, 1),wrn(10, .5),[]
    calls = {k:counted(o) for k,o in dict(teacher=teacher, assistant=assistant).items()}
    def fit(learn):
        for o in calls.values(): o.clear()
        quiet(learn, 2)
        seen.append({k:len(o) for k,o in calls.items()})
    before = {k:v.clone() for k,v in teacher.state_dict().items()}
    links = assist(dls, teacher, [assistant], student, fit, metrics=accuracy)
    n = 2*len(dls.train)
    assert len(links)==2 and links[0].student is assistant and links[1].student is student
    assert seen[0]['teacher']==n and seen[1]['teacher']==0 and n<=seen[1]['assistant'] and not any(calls['assistant'])
    assert all(torch.equal(v, before[k]) for k,v in teacher.state_dict().items())
    assert all('kd' in o.recorder.history for o in links)

def test_callbacks_and_labels(dls, quiet):
    made = []
    def cbs():
        made.append([KD(alpha=.5),AT()])
        return made[-1]
    links = assist(dls, None, [partial(wrn, 10, 2), partial(wrn, 10, 1)], partial(wrn, 10, .5), quiet_fit(quiet), cbs, metrics=accuracy)
    assert len(made)==2 and [[*o.recorder.history][3:] for o in links]==[[],['kd','at'],['kd','at']]
    assert [count_params(o.student) for o in links]==[count_params(wrn(10, k)) for k in (2,1,.5)]
    direct, = assist(dls, links[0], [], partial(wrn, 10, 1), quiet_fit(quiet), metrics=accuracy)
    assert direct.recorder.history['kd'].notna().all()

def quiet_fit(quiet): return lambda learn: quiet(learn, 1)

def never(learn): pytest.fail('trained')

def test_bad_chains(dls, teacher, recwarn):
    net = wrn(10, 1)
    with pytest.raises(ValueError, match='is in the chain twice'): assist(dls, teacher, [net], net, never)
    with pytest.raises(ValueError, match='is in the chain twice'): assist(dls, teacher, [net], teacher, never)
    with pytest.raises(ValueError, match=r'the same outputs, got \(10,\), \(10,\), \(7,\)'): assist(dls, teacher, [net], wrn(10, 1, n_out=7), never)
    with pytest.raises(TypeError, match='The student must be a module'): assist(dls, teacher, [3], net, never)
    assert not [o for o in recwarn if 'parameters' in str(o.message)]

def test_a_larger_assistant_warns(dls, teacher, quiet):
    with pytest.warns(UserWarning, match='Link 1 of the chain has .* more than its teacher'): assist(dls, teacher, [wrn(10, 3)], wrn(10, 1), lambda learn: None)
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        assist(dls, teacher, [wrn(10, 2)], wrn(10, 1), lambda learn: None)

def test_the_same_random_numbers(dls, teacher):
    set_seed(3)
    direct = distill_learner(dls, teacher, partial(wrn, 10, 1))
    set_seed(3)
    link, = assist(dls, teacher, [], partial(wrn, 10, 1), lambda learn: None)
    assert all(torch.equal(a, b) for a,b in zip(direct.model.parameters(), link.model.parameters()))

class Says(nn.Module):
    def __init__(self, *logits):
        super().__init__()
        self.logits = nn.Parameter(tensor(logits))
    def forward(self, x): return self.logits.expand(len(x), -1)

@pytest.mark.parametrize('T', [1.,4.])
def test_probabilities_are_averaged(T, dls):
    a,b,x = Says(9.,0.,0.),Says(0.,1.,0.),torch.zeros(2,3,8,8)
    out = Ensemble(dls, a, b, T=T)(x)
    mean = (F.softmax(a(x)/T, 1)+F.softmax(b(x)/T, 1))/2
    assert torch.allclose(F.softmax(out/T, 1), mean, atol=1e-6)
    assert not torch.allclose(F.softmax(out/T, 1), F.softmax((a(x)+b(x))/2/T, 1), atol=1e-2)

def test_an_ensemble_teaches(dls, quiet):
    teachers = [wrn(10, 1),wrn(10, 2)]
    calls = [counted(o) for o in teachers]
    learn = distill_learner(dls, Ensemble(dls, *teachers), wrn(10, .5), metrics=accuracy)
    for o in calls: o.clear()
    quiet(learn, 1)
    assert all(len(dls.train)==len(o) and not any(o) for o in calls)
    learn = distill_learner(dls, Ensemble(dls, *teachers), wrn(10, .5), AT(pairs={'group3':'networks.1.group3'}))
    quiet(learn, 1)
    assert learn.recorder.history['at'].notna().all()

def test_members_get_what_they_are_used_to(dls):
    stats = ([.1,.2,.3],[.9,.8,.7])
    theirs = Learner(other_stats(stats), wrn(10, 1))
    own = wrn(10, 1)
    ens,x = Ensemble(dls, theirs, own).eval(),dls.valid.one_batch()[0].as_subclass(Tensor)
    net,tfm = teacher_of(theirs, dls)
    with torch.no_grad():
        assert tfm is not None
        want = torch.stack([F.softmax(net(*tfm(x)), 1),F.softmax(own(x), 1)]).mean(0)
        assert torch.allclose(ens(x).exp(), want, atol=1e-5)

def other_stats(stats):
    y = [str(i%10) for i in range(20)]
    return tensor_dls((torch.randint(0, 255, (20,3,32,32), dtype=torch.uint8), y), (torch.randint(0, 255, (20,3,32,32), dtype=torch.uint8), y), bs=4, stats=stats)

def test_bad_ensembles(dls, teacher):
    with pytest.raises(ValueError, match='at least two teachers .* got 1 and'): Ensemble(dls, teacher)
    for weights in ((1,),(1,0),(1,-1),(1,float('inf'))):
        with pytest.raises(ValueError, match='one positive weight for each, got 2 and'): Ensemble(dls, teacher, wrn(10, 1), weights=weights)
