"What a network's outputs mean: given, told by loss and targets, or an error"
import pytest, timm.loss
from conftest import few_digits
from fastai.vision.all import *
from kdfast.all import *
from kdfast.losses.core import kd_loss
from kdfast.losses.logits import logits_loss, sigmoid_kd_loss
from kdfast.teacher.task import task_of

def of_words(p, y): return F.cross_entropy(p.flatten(0, 1), y.flatten())
def bce_dice(p, y): return F.binary_cross_entropy_with_logits(p, y) + 1-2*(p.sigmoid()*y).sum()/(p.sigmoid()+y).sum().clamp(min=1)
class BCEDice(nn.Module):
    def forward(self, p, y): return bce_dice(p, y)

ints,floats = (lambda *s: torch.zeros(s, dtype=torch.long)),torch.zeros
kinds = [(nn.CrossEntropyLoss(), ints(2), (2,5), 'classes', 1), (CrossEntropyLossFlat(), ints(2,6), (2,6,5), 'classes', -1), (CrossEntropyLossFlat(axis=1), ints(2,4,4), (2,5,4,4), 'classes', 1),
    (partial(F.cross_entropy, label_smoothing=.1), ints(2,4), (2,5,4), 'classes', 1), (of_words, ints(2,6), (2,6,5), 'classes', 2), (of_words, ints(2,5), (2,5,5), None, None),
    (LabelSmoothingCrossEntropy(), ints(2), (2,5), 'classes', 1), (timm.loss.SoftTargetCrossEntropy(), floats(2,5), (2,5), 'classes', 1), (nn.CrossEntropyLoss(), floats(2,5), (2,5), 'classes', 1),
    (nn.BCEWithLogitsLoss(), floats(2,5), (2,5), 'labels', None), (partial(F.binary_cross_entropy_with_logits, reduction='mean'), floats(2,1,4,4), (2,1,4,4), 'labels', None), (BCEWithLogitsLossFlat(), floats(2,5), (2,5), 'labels', None),
    (bce_dice, TensorMultiCategory(floats(2,5)), (2,5), 'labels', None), (bce_dice, floats(2,1,4,4), (2,1,4,4), 'numbers', None), (MSELossFlat(), floats(2,3), (2,3), 'numbers', None),
    (F.l1_loss, ints(2,3), (2,3), 'numbers', None), (of_words, TensorCategory(ints(2)), (2,5), 'classes', 1), (nn.CrossEntropyLoss(), None, (2,5), 'classes', 1), (None, None, (2,5), 'classes', 1)]

guessed = bce_dice,LabelSmoothingCrossEntropy,timm.loss.SoftTargetCrossEntropy,of_words,None

@pytest.mark.parametrize('loss,y,shape,kind,axis', kinds, ids=lambda o: None)
def test_what_loss_and_targets_tell(loss, y, shape, kind, axis):
    if kind is None:
        with pytest.raises(ValueError, match='axis 1 or 2: pass axis='): task_of(loss, y, torch.zeros(shape))
        return
    task = task_of(loss, y, torch.zeros(shape))
    assert task.kind==kind and axis in (None,task.axis)
    others = {'classes','labels','numbers'}-{kind}
    assert task_of(loss, y, torch.zeros(shape), outputs=kind).why=='as given'
    sure = loss not in guessed and not isinstance(loss, guessed[1:3]) or type(y) in (TensorMultiCategory,TensorCategory)
    for o in others:
        if sure:
            with pytest.raises(ValueError, match=f"outputs='{o}' contradicts .*, which is for {kind}: leave it out"): task_of(loss, y, torch.zeros(shape), outputs=o)
        else: assert task_of(loss, y, torch.zeros(shape), outputs=o).kind==o

def test_what_does_not_fit():
    with pytest.raises(ValueError, match="must be classes, labels or numbers, got 'regression'"): task_of(None, None, torch.zeros(2,5), outputs='regression')
    for loss,axis in ((nn.CrossEntropyLoss(),None), (of_words,1), (CrossEntropyLossFlat(axis=1),None)):
        with pytest.raises(ValueError, match=r'do not fit labels \(2, 6\): pass axis=2'): task_of(loss, ints(2,6), torch.zeros(2,6,5), axis=axis)

def loaders(x, y, n_inp=1): return DataLoaders(*(DataLoader([*zip(x, y)], bs=4, n_inp=n_inp) for _ in range(2)))

class Values(Callback):
    "What the first term added in the first step, and what both networks put out"
    order,run_valid = 2,False
    def before_fit(self): self.said = []
    def after_loss(self): self.said.append((self.learn.teacher.terms[0].value.item(), self.pred.detach().clone(), self.learn.teacher.out.clone()))

def value_of(dls, net, loss, term, quiet, **kwargs):
    learn = distill_learner(dls, net(), net(), cbs=[*L(term), Values()], loss_func=loss, precision='float32', **kwargs)
    shown = str(learn.show_distill())
    quiet(learn, 1, 1e-3)
    return *learn.values.said[0],shown

def words(n=7):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb,self.out = nn.Embedding(n, 8),nn.Linear(8, n)
        def forward(self, x): return self.out(self.emb(x))
    return Net

@pytest.mark.parametrize('given', [{},dict(axis=2),dict(axis=-1,outputs='classes')])
def test_a_language_model_under_a_plain_function(given, quiet):
    x,y = torch.randint(7, (8,6)),torch.randint(7, (8,6))
    v,s,t,shown = value_of(loaders(x, y), words(), of_words, LogitKD(kd_loss), quiet, **given)
    flat = lambda o: o.flatten(0, 1)
    assert v==pytest.approx(kd_loss(flat(s), flat(t)).item(), rel=1e-5) and 'classes along axis' in shown
    with pytest.raises(ValueError, match='pass axis=2'): value_of(loaders(x, y), words(), of_words, KD(), quiet, axis=1)

def test_as_many_words_as_classes(quiet):
    x,y = torch.randint(6, (8,6)),torch.randint(6, (8,6))
    with pytest.raises(ValueError, match='axis 1 or 2: pass axis='): value_of(loaders(x, y), words(6), of_words, KD(), quiet)
    v,s,t,_ = value_of(loaders(x, y), words(6), of_words, LogitKD(kd_loss), quiet, axis=2)
    assert v==pytest.approx(kd_loss(s.flatten(0, 1), t.flatten(0, 1)).item(), rel=1e-5)

def conv(c): return lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, c, 1))

@pytest.mark.parametrize('loss', [bce_dice,BCEDice()])
def test_masks_in_one_channel(loss, quiet):
    dls = loaders(torch.randn(8,3,8,8), torch.rand(8,1,8,8).round())
    with pytest.raises(ValueError, match="outputs='labels'"): value_of(dls, conv(1), loss, KD(), quiet)
    with pytest.raises(ValueError, match="pass outputs='labels'"): value_of(dls, conv(1), loss, SigmoidKD(), quiet)
    v,s,t,shown = value_of(dls, conv(1), loss, SigmoidKD(T=2.), quiet, outputs='labels')
    assert v==pytest.approx(sigmoid_kd_loss(s, t, 2.).item(), rel=1e-5) and 'Outputs: labels, as given' in shown

def test_the_default_is_for_the_task(quiet):
    "Without a term: soft labels, independent labels, numbers"
    x = torch.randn(8,3,8,8)
    flat = lambda: nn.Sequential(conv(5)(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    tasks = [(nn.CrossEntropyLoss(), torch.randint(5, (8,)), 'kd', None), (timm.loss.SoftTargetCrossEntropy(), torch.rand(8,5), 'kd', None),
        (nn.BCEWithLogitsLoss(), torch.rand(8,5).round(), 'sigmoidkd', partial(sigmoid_kd_loss, T=1.)), (nn.MSELoss(), torch.randn(8,5), 'logits', logits_loss)]
    for loss,y,name,by_hand in tasks:
        v,s,t,shown = value_of(loaders(x, y), flat, loss, [], quiet)
        assert re.search(rf'\b{name}\b', shown)
        if by_hand: assert v==pytest.approx(by_hand(s, t).item(), rel=1e-5)

def test_a_copy_keeps_what_was_given():
    learn = distill_learner(few_digits(), wrn(10, 1), wrn(10, 1), cbs=KD(), outputs='classes', axis=1)
    cb = deepcopy(learn.teacher)
    assert (cb.outputs,cb.axis)==('classes',1)
