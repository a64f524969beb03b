"Every mistake is answered at once, names its remedy, and leaves learner and networks as they were"
import importlib.util, pytest
from conftest import few_digits, n_hooks, slow_but
from fastai.vision.all import *
from kdfast.all import *
from kdfast.teacher.source import teacher_of
from kdfast.losses.core import hint_loss

def snapshot(*nets): return [(m.training, [p.requires_grad for p in m.parameters(recurse=False)]) for net in nets for m in net.modules()]

def taught(dls, teacher, student, *terms, **kwargs): return Learner(dls, student, cbs=[TeacherCallback(teacher), *terms], **kwargs)

def nan_teacher():
    net = wrn(10, 2)
    nn.init.constant_(net.fc.bias, float('nan'))
    return net

class Silent(nn.Sequential):
    "A student that has a layer which it does not call"
    def __init__(self):
        super().__init__(OrderedDict(body=wrn(10, 1), unused=nn.Conv2d(3, 3, 1)))
    def forward(self, x): return self.body(x)

class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
    def forward(self, x): return x*self.scale,x

class First(nn.Module):
    def forward(self, x): return x[0]

def loaders(y): return DataLoaders(*(torch.utils.data.DataLoader(list(zip(torch.randn(16,3,32,32), y)), batch_size=8) for _ in range(2)))

cases = {
    'width of a WRN':        (lambda d: wrn(10, -1), 'its width above 0, got 10 and -1'),
    'no width of a WRN':     (lambda d: wrn(10, 0), 'its width above 0, got 10 and 0'),
    'unknown student layer': (lambda d: taught(d, wrn(10,2), wrn(10,1), AT({'grop1':'group1'})), "did you mean 'group1'"),
    'unknown teacher layer': (lambda d: taught(d, wrn(10,2), wrn(10,1), FitNet({'group1':'group1.0.conv'})), "'group1.0.conv1'"),
    'numbers of outputs':    (lambda d: distill_learner(d, wrn(10,2,n_out=5), wrn(10,1), cbs=KD()), "same outputs, got (10,) and (5,)"),
    'too few outputs of a student': (lambda d: distill_learner(d, wrn(10,2), wrn(10,1,n_out=5)), "has 5 outputs for 10 classes: create it with n_out=10"),
    'too few outputs, and features': (lambda d: distill_learner(d, wrn(10,2), wrn(10,1,n_out=5), cbs=FitNet()), "has 5 outputs for 10 classes"),
    'a name for the command line': (lambda d: distill_learner(d, wrn(10,2), 'wrn-10-1'), "a function of n_out such as partial(resnet, 10)?"),
    'the name of a method':  (lambda d: distill_learner(d, wrn(10,2), wrn(10,1), cbs='kd'), "cbs must be callbacks such as KD(), got 'kd'"),
    'sizes a hint cannot adapt': (lambda d: taught(d, nn.Sequential(OrderedDict(stem=nn.Conv2d(3,8,3,padding=4), net=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8,10)))),
                                   wrn(10,1), FitNet({'fc':'stem'})), "need two feature maps or two vectors"),
    'unequal maps for a loss that needs equal': (lambda d: taught(d, wrn(10,2), wrn(10,1), FeatureKD(F.mse_loss, {'group1':'group2'})), "cannot compare 'group1', (2, 16, 16, 16), with 'group2'"),
    'broadcast maps':        (lambda d: taught(d, wrn(10,2), wrn(10,1), FeatureKD(F.mse_loss, {'fc':'group2'})), "cannot compare"),
    'no pair found':         (lambda d: taught(d, wrn(10,2), nn.Sequential(nn.Flatten(), nn.Linear(3*16*16, 10)), AT()), "the student has no convolutional stages: use KD"),
    'empty pairs':           (lambda d: FitNet({}), "at least one pair"),
    'pairs of no dict':      (lambda d: AT(['group1']), "{'student.layer': 'teacher.layer'}"),
    'per_stage too large':   (lambda d: taught(d, wrn(16,2), wrn(10,1), AT(per_stage=2)), "with 1 block: lower it"),
    'layer never called':    (lambda d: taught(d, wrn(10,2), Silent(), FitNet({'unused':'group1'})), "was not called"),
    'one module twice':      (lambda d: (lambda net: distill_learner(d, net, net))(wrn(10,1)), "share parameters"),
    'shared body':           (lambda d: (lambda net: distill_learner(d, nn.Sequential(*net), net))(wrn(10,1)), "share parameters"),
    'NaN in the teacher':    (lambda d: distill_learner(d, nan_teacher(), wrn(10,1)), "NaN or infinity for a batch of zeros"),
    'teacher gives a dict':  (lambda d: distill_learner(d, type('Named', (nn.Module,), {'forward': lambda self,x: {'logits':[x]}})(), wrn(10,1)), "must return a tensor"),
    'term without teacher':  (lambda d: distill_learner(d, None, wrn(10,1), cbs=KD()), "needs a teacher"),
    'class without teacher': (lambda d: distill_learner(d, None, wrn(10,1), cbs=[KD]), "needs a teacher"),
    'two teachers':          (lambda d: taught(d, wrn(10,2), wrn(10,1), TeacherCallback(wrn(10,2)), KD()), "one TeacherCallback"),
    'T=0':                   (lambda d: KD(T=0), "must be positive"),
    'alpha in percent':      (lambda d: KD(alpha=90), "in [0,1]"),
    'alpha schedule':        (lambda d: KD(alpha=SchedLin(0., 2.)), "in [0,1]"),
    'multi-label':           (lambda d: taught(d, wrn(10,2), wrn(10,1), KD(), loss_func=nn.BCEWithLogitsLoss()), "multi-label"),
    'one output':            (lambda d: taught(d, wrn(10,2,n_out=1), wrn(10,1,n_out=1), KD()), "at least two classes"),
    'teacher is a learner':  (lambda d: TeacherCallback(Learner(d, wrn(10,2))), "pass learn.model"),
    'teacher is a number':   (lambda d: distill_learner(d, 3, wrn(10,1)), "path of an exported learner"),
    'student is a number':   (lambda d: distill_learner(d, wrn(10,2), 3), "a function of n_out"),
    'no such file':          (lambda d: distill_learner(d, 'nowhere.pkl', wrn(10,1)), "'nowhere.pkl'"),
    'wrn depth':             (lambda d: wrn(20, 1), "6n+4"),
    'resnet depth':          (lambda d: resnet(50), "one of [10, 14, 18, 20, 26, 34]"),
    'resnet stem':           (lambda d: resnet(18, stem='tiny'), "'imagenet' or 'small'"),
    'timm is not installed':  (lambda d: distill_learner(d, wrn(10,2), 'no_such_architecture'), "timm"),
    'attention of vectors':  (lambda d: taught(d, wrn(10,2), wrn(10,1), AT({'flat':'flat'})), "maps (bs,c,h,w)"),
    'alpha between the ends': (lambda d: KD(alpha=combine_scheds([.5,.5], [SchedLin(0.,5.), SchedLin(5.,0.)])), "in [0,1]"),
    'regression':            (lambda d: taught(loaders(torch.randn(16,3)), wrn(10,2,n_out=3), wrn(10,1,n_out=3), KD(), loss_func=MSELossFlat()), "regression targets: use Logits"),
    'functional BCE':        (lambda d: taught(loaders(torch.ones(16,3)), wrn(10,2,n_out=3), wrn(10,1,n_out=3), KD(), loss_func=F.binary_cross_entropy_with_logits), "multi-label"),
    'student gives a tuple': (lambda d: distill_learner(d, wrn(10,2), Pair()), "The student must return a tensor"),
    'layer gives a tuple':   (lambda d: taught(d, wrn(10,2), nn.Sequential(OrderedDict(pair=Pair(), pick=First(), net=wrn(10,1))), FeatureKD(F.mse_loss, {'pair':'group1'})), "outputs a tuple"),
    'student is a number':   (lambda d: distill_learner(d, wrn(10,2), 18), "such as learn.model"),
    'number of classes':     (lambda d: distill_learner(loaders(torch.zeros(16).long()), None, partial(wrn,10,1), loss_func=CrossEntropyLossFlat()), "set dls.c"),
}

if importlib.util.find_spec('timm'): del cases['timm is not installed']

@pytest.mark.parametrize('name', cases)
def test_case(name, dls):
    make,message = cases[name]
    with pytest.raises((ValueError,TypeError,FileNotFoundError,ImportError)) as e: make(dls)
    assert message in str(e.value)

@pytest.mark.parametrize('term', [lambda: AT({'nowhere':'group1'}), lambda: FitNet({'group1':'nowhere'}), lambda: FeatureKD(hint_loss)])
def test_nothing_is_left_behind(term, dls, quiet):
    "A term that cannot work is refused by a learner that goes on without it"
    teacher,student = wrn(10, 2),wrn(10, 1)
    teacher.group2.eval()
    teacher.fc.weight.requires_grad_(False)
    learn = distill_learner(dls, teacher, student)
    quiet(learn, 1, 1e-3)
    before,model,splitter,keys = snapshot(teacher),learn.model,learn.splitter,set(vars(learn))
    with pytest.raises(ValueError): quiet(learn, 1, cbs=term())
    assert snapshot(teacher)==before
    assert learn.model is model and learn.splitter is splitter and set(vars(learn))==keys and n_hooks(teacher, student)==0
    quiet(learn, 1, 1e-3)
    assert learn.recorder.values[0][2]>0

def test_fit_without_what_it_needs(dls, quiet):
    with pytest.raises(ValueError, match='has no teacher'): quiet(Learner(dls, wrn(10, 1), cbs=AT()), 1)
    with pytest.raises(ValueError, match='alone teaches nothing'): quiet(Learner(dls, wrn(10, 1), cbs=TeacherCallback(wrn(10, 2))), 1)

def test_vocab(dls, tmp_path):
    teacher = Learner(dls, wrn(10, 2), path=tmp_path)
    teacher.export()
    turned = few_digits(20, per_class=8)
    for ds in (turned.train_ds,turned.valid_ds): ds.tls[1].tfms.fs[1].vocab = CategoryMap([*'1023456789'], sort=False)
    for t in (teacher, tmp_path/'export.pkl'):
        with pytest.raises(ValueError) as e: teacher_of(t, turned)
        assert str([*'0123456789']) in str(e.value) and str([*'1023456789']) in str(e.value) and 'order included' in str(e.value)
        assert distill_learner(turned, t, wrn(10, 1)).teacher.picks==[1,0,*range(2, 10)]

def test_files_that_are_no_learner(dls, tmp_path):
    (tmp_path/'text.pkl').write_text('hello')
    torch.save({'a': 1}, tmp_path/'dict.pkl')
    torch.save(wrn(10, 1), tmp_path/'module.pkl')
    for f in ('text','dict','module'):
        with pytest.raises(ValueError, match=r'learn.export\(\)'): distill_learner(dls, tmp_path/f'{f}.pkl', wrn(10, 1))

def test_nan_later(dls, quiet):
    teacher = wrn(10, 2)
    learn = distill_learner(dls, teacher, wrn(10, 1))
    quiet(learn, 1, 1e-3)
    nn.init.constant_(teacher.fc.bias, float('nan'))
    with pytest.raises(ValueError, match='returned NaN or infinity in epoch 0'): quiet(learn, 2)
    assert n_hooks(teacher, learn.student)==0 and teacher.training

events = ['before_train','before_batch','after_pred','after_loss','before_step','after_batch','before_validate','after_epoch']

@pytest.mark.parametrize('exc', [KeyboardInterrupt, RuntimeError, CancelFitException, CancelTrainException, CancelEpochException])
@pytest.mark.parametrize('event', slow_but('before_train', 'after_loss', 'before_validate', of=events))
def test_however_a_fit_ends(event, exc, dls, quiet):
    class Stop(Callback):
        order = 3
        def __init__(self): setattr(self, event, self._stop)
        def _stop(self):
            if self.training or event in events[-2:]: raise exc('stop')
    teacher,student = wrn(10, 2),wrn(10, 1)
    teacher.group2.eval()
    learn = distill_learner(dls, teacher, student, cbs=[KD(),AT(),FitNet()])
    quiet(learn, 1, 1e-3)
    modes,keys = snapshot(teacher),set(vars(learn))
    try: quiet(learn, 1, cbs=Stop())
    except (KeyboardInterrupt,RuntimeError,CancelTrainException,CancelEpochException): pass
    assert n_hooks(teacher, student)==0 and snapshot(teacher)==modes and all(p.requires_grad for p in learn.model.parameters())
    assert '_do_epoch_train' not in vars(learn)
    assert learn.teacher.out is None and not learn.teacher.taps and not learn.teacher.student_taps.outs
    quiet(learn, 1, 1e-3)
    assert all(v>0 for v in learn.recorder.values[0][2:])

def test_a_cancelled_fit_leaves_no_column_behind(dls, quiet):
    "lr_find ends with CancelFitException, in which after_epoch is skipped"
    learn = distill_learner(dls, wrn(10, 2), wrn(10, 1), metrics=accuracy, path=tempfile.mkdtemp())
    with learn.no_bar(): learn.lr_find(num_it=8, show_plot=False)
    with learn.no_bar(): assert len(learn.validate())==2

def test_training_cancelled_before_the_first_batch(dls, quiet):
    class Skip(Callback):
        def before_train(self): raise CancelTrainException
    learn = distill_learner(dls, wrn(10, 2), wrn(10, 1))
    quiet(learn, 1, cbs=Skip())
    quiet(learn, 1)
    assert learn.recorder.values[0][2]>0

@pytest.mark.parametrize('mix', [MixUp,CutMix])
def test_an_interrupt_under_mixup(mix, dls, quiet):
    class Stop(Callback):
        def after_loss(self): raise KeyboardInterrupt
    learn = distill_learner(dls, wrn(10, 2), wrn(10, 1), cbs=[mix(),KD()])
    loss_func = learn.loss_func
    with pytest.raises(KeyboardInterrupt): quiet(learn, 1, cbs=Stop())
    assert learn.loss_func is loss_func
    quiet(learn, 1)
    assert learn.recorder.values[0][2]>0

def test_a_shared_term(dls, quiet):
    "A callback belongs to the learner it was given to last; the first would train without it"
    terms = [KD(),AT()]
    first,second = (distill_learner(dls, wrn(10, 2), wrn(10, 1), cbs=terms) for _ in range(2))
    with pytest.raises(ValueError, match='belongs to one learner'): quiet(first, 1)
    quiet(second, 1)

def test_columns_when_validation_is_skipped(dls, quiet):
    class Skip(Callback):
        def before_validate(self): raise CancelValidException
    learn = quiet(distill_learner(dls, wrn(10, 2), wrn(10, 1), cbs=[KD(),AT(),Skip()], metrics=accuracy), 1)
    row = learn.recorder.history.iloc[0]
    assert row['kd']>0 and row['at']>0 and pd.isna(row['valid_loss']) and pd.isna(row['accuracy'])

def test_copies(dls, quiet):
    "A copy of a learner goes on distilling, from the same data and teacher"
    learn = quiet(distill_learner(dls, wrn(10, 2), wrn(10, 1), cbs=[KD(),FitNet()]), 1)
    copy = quiet(deepcopy(learn), 1)
    assert copy.teacher.network is learn.teacher.network and copy.model is not learn.model and copy.teacher.learn is copy
    assert all(v>0 for v in copy.recorder.values[0][2:])

def test_a_dropout_in_place_after_a_tap(dls, quiet):
    "It writes in training only, so the probe in eval mode cannot see it"
    def net(inplace): return nn.Sequential(OrderedDict(b=nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU()), drop=nn.Dropout(.5, inplace=inplace),
        head=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))))
    term = lambda: FeatureKD(lambda s,t: (s-t).pow(2).mean(), {'b':'b'})
    with pytest.raises(ValueError, match="use inplace=False"): quiet(distill_learner(dls, net(False), net(True), cbs=term()), 1)
    quiet(distill_learner(dls, net(False), net(False), cbs=term()), 1)

def test_history_after_validate(dls, quiet):
    learn = quiet(distill_learner(dls, wrn(10, 2), wrn(10, 1), metrics=accuracy), 1)
    assert list(learn.recorder.history)==['train_loss','valid_loss','accuracy','kd']
    with learn.no_bar(): learn.validate()
    with pytest.raises(ValueError, match='right after fit'): learn.recorder.history
