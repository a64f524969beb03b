"What is predicted before training, and that nothing is changed by asking"
import pytest
from conftest import few_digits
from fastai.vision.all import *
from kdfast.all import *
from kdfast.core import first_batches
from kdfast.look.outlook import _trained, expected, fractions, Outlook, widest
from kdfast.teacher.source import normalizer

few = partial(few_digits, valid=100)

def asked(*args, **kwargs): return will_it_help(*args, minutes=.02, **kwargs)

class Raw(nn.Module):
    "A network that takes images in [0,1]"
    def __init__(self, net, norm): super().__init__(); self.net,self.norm = net,norm
    def forward(self, x): return self.net((x-self.norm.mean)/self.norm.std)

def test_a_good_teacher(trained):
    found = asked(few(), trained, partial(wrn, 10, 1), alone=.5)
    assert found.expect=='gain' and found.begin=='FitNet()' and not found.faults
    right = accuracy_of(trained, few())
    assert found.found['accuracy']==pytest.approx(right, abs=.15)
    assert found.gains==expected(found.found['accuracy'], .5) and found.gains['hints']==pytest.approx(100*fractions['hints']*widest)
    assert 'Expect a gain' in str(found) and 'hints' in str(found) and 'wider than 20 points' in str(found)
    near = asked(few(), trained, partial(wrn, 10, 1), alone=.9)
    assert near.gains['hints']==pytest.approx(100*fractions['hints']*(near.found['accuracy']-.9)) and 'wider' not in str(near)

def test_a_teacher_that_knows_no_more(trained):
    found = asked(few(), trained, partial(wrn, 10, 1), alone=.98)
    assert found.expect in ('none','loss') and 'no gain' in str(found)
    assert asked(few(), wrn(10, 2), wrn(10, 1), alone=.7).expect=='loss'

def test_faults_are_named_with_their_remedy(trained):
    turned = nn.Sequential(deepcopy(trained), nn.Linear(10, 10, bias=False))
    turned[1].weight.data = torch.eye(10).roll(3, 0)
    found = asked(few(), turned, wrn(10, 1), alone=.5)
    assert found.expect=='loss' and 'different order' in found.faults[0] and 'teacher_vocab' in str(found)
    assert len(found.faults)==1
    picks = [(i+3)%10 for i in range(10)]
    assert not asked(few(), turned, wrn(10, 1), alone=.5, teacher_vocab=picks).faults
    found = asked(few(), Raw(trained, normalizer(few())), wrn(10, 1), alone=.5)
    assert found.expect=='loss' and 'normalized differently' in found.faults[0] and 'in [0,1]' in found.faults[0]

def test_the_right_order_explains_a_wrong_one():
    "Other normalization brings some images to their class by chance, so that it is no fault beside a better explanation"
    found = dict(accuracy=0., reordered=.97, augmented=0., renormalized=('in [0,1]',.14))
    assert len(Outlook(found, .5, 10, 1.).faults)==1
    assert len(Outlook({**found, 'reordered':0.}, .5, 10, 1.).faults)==1

def test_a_teacher_of_other_classes(trained):
    "Its features are measured in place of its outputs"
    other = wrn(10, 2, n_out=7)
    other.load_state_dict({k:v for k,v in trained.state_dict().items() if not k.startswith('fc')}, strict=False)
    found = asked(few(), other, partial(wrn, 10, 1), alone=.3)
    assert 'accuracy' not in found.found and found.found['linear']>.6 and found.expect=='gain' and found.begin=='FitNet(standardize=True)'
    assert found.gains==expected(found.found['linear'], .3)

def test_nothing_is_changed(trained):
    "Neither the student, the teacher, the random states nor the order of the next batches"
    dls,student = few(),wrn(10, 1)
    before,teacher = deepcopy(student.state_dict()),deepcopy(trained.state_dict())
    def after(ask):
        set_seed(3)
        dls.train.rng.seed(3)
        if ask:
            found = asked(dls, trained, student)
            assert found.steps>=20 and 0<=found.alone<=1 and 'student alone' in str(found)
        return torch.rand(3),dls.one_batch()[0]
    for a,b in zip(after(False), after(True)): assert torch.equal(a, b)
    for net,state in ((student,before),(trained,teacher)):
        for k,v in net.state_dict().items(): assert torch.equal(v, state[k])

def test_the_student_alone_learns():
    learn = distill_learner(few(), None, wrn(10, 1), lr=1e-2)
    def loss():
        with torch.no_grad(): return np.mean([F.cross_entropy(*(o.as_subclass(Tensor) for o in (learn.model.train()(x), y))).item() for x,y in first_batches(learn.dls)])
    before = loss()
    assert _trained(learn, 30)>0 and loss()<before-.5

@pytest.mark.parametrize('wrong', [dict(minutes=0), dict(alone=85), dict(minutes=-1.)])
def test_arguments_that_make_no_sense(wrong, trained):
    with pytest.raises(ValueError, match='omit them for the defaults'): will_it_help(few(), trained, wrn(10, 1), **wrong)

def test_targets_that_are_no_classes(trained):
    x = torch.rand(20, 3, 32, 32)
    numbers = DataLoaders(*(DataLoader([*zip(x, torch.rand(20, 10))], bs=10) for _ in range(2)))
    with pytest.raises(ValueError, match='one label'): asked(numbers, trained, wrn(10, 1), loss_func=MSELossFlat())
