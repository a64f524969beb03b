"Training block by block: what a stage changes, what it computes, and what is left when it ends"
import os, subprocess, sys, pytest, warm
from conftest import few_digits, n_hooks
from fastai.vision.all import *
from fastai.callback.tracker import *
from kdfast.all import *
from kdfast.layers.adapters import adapters_of, bare_model
from kdfast.layers.cut import laid_out
from torchvision.models import mobilenet_v2, resnet18

stages = 'group1','group2','group3'

def states(net): return {k:v.clone() for k,v in net.state_dict().items()}

def changed(before, net): return {k.split('.')[0] for k,v in net.state_dict().items() if not torch.equal(v, before[k])}

@pytest.fixture
def learn(dls, teacher): return distill_learner(dls, teacher, partial(wrn, 10, 1), metrics=accuracy)

@pytest.fixture
def fit():
    def fit(learn, *args, **kwargs):
        with learn.no_bar(), learn.no_logging(): return learn.fit_blocks(*args, **kwargs)
    return fit

def own_cbs(learn): return [o for o in learn.cbs if not isinstance(o, ProgressCallback)]  # which no_bar makes anew

class Look(Callback):
    "Keeps something of every training batch"
    order = 5
    def __init__(self, what): self.what,self.kept = what,[]
    def after_loss(self):
        if self.training: self.kept.append(self.what(self))

class Break(Callback):
    "Raises at `event` of the `n`th stage"
    order = 70
    def __init__(self, n, event, error): self.n,self.event,self.error,self.fits = n,event,error,0
    def __call__(self, event):
        if event=='before_fit': self.fits += 1
        if event==self.event and self.fits==self.n: raise self.error("as asked")

# What a stage changes

@pytest.mark.parametrize('i', range(3))
def test_a_stage_changes_its_block_alone(i, learn, teacher, fit):
    before,taught = states(learn.student),states(teacher)
    fit(learn, [int(j==i) for j in range(3)], head=0)
    block = find_blocks(learn)[i]
    moved = {k for k,v in learn.student.state_dict().items() if not torch.equal(v, before[k])}
    own = block.params | {f'{n}.{k}' for n in block.layers for k in ('running_mean','running_var','num_batches_tracked')}
    assert moved and moved <= own
    assert block.params <= moved and any('running_var' in k for k in moved)
    assert not changed(taught, teacher)

def test_the_adapter_learns_and_goes(learn, fit):
    seen = []
    fit(learn, [1,0,0], head=0, cbs=Look(lambda cb: seen.append({n:p.detach().clone() for n,p in cb.model.adapters.named_parameters()})))
    assert all(not torch.equal(seen[0][n], seen[-1][n]) for n in seen[0])
    assert learn.model is learn.student and type(learn.model) is nn.Sequential and not adapters_of(learn.model)

def test_only_what_learns_is_in_the_optimizer(dls, teacher, fit, quiet):
    "Also where the learner has an optimizer already, and groups of its own"
    learn = distill_learner(dls, teacher, partial(wrn, 10, 1), splitter=lambda m: L(m.stem, nn.ModuleList([*m.children()][1:])).map(params))
    quiet(learn, 1, 1e-3)
    opt = learn.opt
    look = Look(lambda cb: ({id(p) for g in cb.opt.param_lists for p in g}, {id(p) for p in cb.model.parameters() if p.requires_grad}))
    fit(learn, 1, head=1, cbs=look)
    assert all(a==b for a,b in look.kept) and len({frozenset(a) for a,_ in look.kept})==4
    assert learn.opt is opt and len(opt.param_lists)==2

def test_the_classifier_alone_learns_at_last(learn, fit):
    before = states(learn.student)
    fit(learn, 0, head=1)
    assert changed(before, learn.student)=={'bn','fc'}
    fit(learn, 0, head=1, unfreeze=True)
    assert changed(before, learn.student)=={'stem',*stages,'bn','fc'}

@pytest.mark.parametrize('mode', ['simultaneous','parallel'])
def test_all_blocks_at_once_leave_the_classifier(mode, learn, fit):
    learn.student.bn.running_mean.fill_(.5)  # as after some training
    before,momenta = states(learn.student),[m.momentum for m in learn.student.modules() if isinstance(m, nn.BatchNorm2d)]
    fit(learn, 1, head=0, mode=mode)
    assert changed(before, learn.student)=={'stem',*stages}
    assert [m.momentum for m in learn.student.modules() if isinstance(m, nn.BatchNorm2d)]==momenta

# What it computes

def calls_of(net, kept, name):
    return [m.register_forward_hook(lambda m,i,o,n=f'{name}.{n}': kept.append((n, o.grad_fn is not None))) for n,m in net.named_children()]

@pytest.mark.parametrize('i', range(3))
def test_nothing_is_computed_past_the_tap(i, learn, teacher, fit):
    calls,epochs = [],[int(j==i) for j in range(3)]
    class Start(Callback):
        "What is called in the fit itself, not while it is prepared"
        def before_fit(self): calls.clear()
    handles = calls_of(learn.student, calls, 'student') + calls_of(teacher, calls, 'teacher')
    fit(learn, epochs, head=0, cbs=Start())
    for h in handles: h.remove()
    called = {n for n,_ in calls}
    past = {f'{net}.{n}' for net in ('student','teacher') for n in (*stages[i+1:],'bn','act','pool','flat','fc')}
    assert not called & past and called=={f'{net}.{n}' for net in ('student','teacher') for n in ('stem',*stages[:i+1])}
    n = len(learn.dls.train)+len(learn.dls.valid)
    assert sum(n_=='teacher.stem' for n_,_ in calls)==sum(n_=='student.stem' for n_,_ in calls)==n
    with_graph = {n for n,graph in calls if graph}
    assert with_graph==({'student.stem','student.group1'} if i==0 else {f'student.{stages[i]}'})

def test_one_look_at_the_teacher_serves_all_parallel_blocks(learn, teacher, fit):
    calls = []
    look = Look(lambda cb: calls.append(0))
    handles = [teacher.group3.register_forward_hook(lambda *_: calls.append(1)), teacher.bn.register_forward_hook(lambda *_: calls.append(2))]
    class Start(Callback):
        def before_fit(self): calls.clear()
        def after_train(self): self.learn.seen = [*calls]
    fit(learn, 1, head=0, mode='parallel', cbs=[look,Start()], validate=False)
    for h in handles: h.remove()
    assert learn.seen==[1,0]*len(learn.dls.train)

def by_hand(student, teacher, x, i):
    "Gradients of block i from a loop without hooks: earlier blocks in eval, no graph"
    s,t = student.stem(x),teacher.eval().stem(x)
    for j,n in enumerate(stages[:i+1]):
        part = getattr(student, n)
        with torch.no_grad(): t = getattr(teacher, n)(t)
        if j<i:
            with torch.no_grad(): s = part.eval()(s)
        else: s = part.train()(s)
    return s,t

@pytest.mark.parametrize('i', range(3))
def test_gradients_are_those_of_a_loop(i, dls, quiet):
    student,teacher = wrn(10, 1),wrn(16, 1)  # as wide as each other, so that no adapter stands between
    copy,grads = deepcopy(student),[]
    class Keep(Callback):
        def before_step(self):
            grads.append((self.x.clone(), {n:p.grad.clone() for n,p in self.learn.student.named_parameters() if p.grad is not None}))
            raise CancelFitException("enough")
    learn = distill_learner(dls, teacher, student, precision='float32')
    quiet(learn, [int(j==i) for j in range(3)], how='fit_blocks', head=0, cbs=Keep())
    (x,ours), = grads
    s,t = by_hand(copy.train(), teacher, *laid_out([x.as_subclass(Tensor)], copy), i)  # in one order, so that one rounds as the other
    F.mse_loss(s, t).backward()
    theirs = {n:p.grad for n,p in copy.named_parameters() if n in ours}
    assert len(ours)==len(find_blocks(learn)[i].params)
    for n,g in ours.items(): assert (g-theirs[n]).norm()<=1e-5*theirs[n].norm(), n

def test_no_gradient_crosses_a_parallel_block(dls, quiet):
    "Each block's gradient is that of the block alone on the teacher's map"
    student,teacher = wrn(10, 1),wrn(16, 1)
    copy,grads = deepcopy(student),[]
    class Keep(Callback):
        def before_step(self):
            grads.append((self.x.as_subclass(Tensor).clone(), {n:p.grad.clone() for n,p in self.learn.student.named_parameters() if p.grad is not None}))
            raise CancelFitException("enough")
    quiet(distill_learner(dls, teacher, student, precision='float32'), 1, how='fit_blocks', head=0, mode='parallel', cbs=Keep())
    (x,ours), = grads
    x, = laid_out([x], copy)
    with torch.no_grad():
        maps = [teacher.eval().stem(x)]
        for n in stages: maps.append(getattr(teacher, n)(maps[-1]))
    copy.train()
    outs = [copy.group1(copy.stem(x)), copy.group2(maps[1]), copy.group3(maps[2])]
    sum(F.mse_loss(s, t)/3 for s,t in zip(outs, maps[1:])).backward()
    assert {n.split('.')[0] for n in ours}=={'stem',*stages}
    for n,p in copy.named_parameters():
        if n in ours: assert (ours[n]-p.grad).norm()<=1e-5*p.grad.norm(), n

def test_a_narrower_student_is_fed_with_one_fixed_projection(learn, teacher, fit):
    learn.teacher.precision = 'float32'
    kept = Look(lambda cb: (cb.model.adapters.state_dict(), [o.detach() for o in cb.pred], cb.x.as_subclass(Tensor).clone()))
    run = fit(learn, 2, head=0, mode='parallel', cbs=kept)
    first,last = kept.kept[0],kept.kept[-1]
    assert all(torch.equal(v, last[0][k]) for k,v in first[0].items()) and {k.split('.')[0] for k in first[0]}=={f'of_{o}' for o in stages}
    with torch.no_grad(): t = teacher.eval().group1(teacher.stem(first[2]))
    z = F.conv2d(t, first[0]['of_group1.weight'], first[0]['of_group1.bias'])
    assert torch.allclose(first[1][1], z, atol=1e-4) and z.var(dim=(0,2,3)).median().sqrt().item()==pytest.approx(1, abs=.3)
    assert list(run.fed.index)==[*stages]

def test_what_the_student_feeds_itself(teacher, fit):
    "The hint losses in `fed`, computed from the networks alone"
    dls,student = few_digits(),wrn(10, 1)
    teacher = wrn(16, 1)  # as wide, so that hints are its own maps
    run = fit(distill_learner(dls, teacher, student, precision='float32'), 2, head=0, mode='parallel')
    x = torch.cat([b[0].as_subclass(Tensor) for b in dls.valid])
    student.eval(), teacher.eval()
    with torch.no_grad():
        t1 = teacher.group1(teacher.stem(x))
        t2,s1 = teacher.group2(t1),student.group1(student.stem(x))
        by_itself = F.mse_loss(student.group2(s1), t2).item()
    assert run.fed.loc['group2','fed by itself']==pytest.approx(by_itself, rel=1e-3)
    by_teacher = run.fed.loc['group2','fed by the teacher']
    assert by_teacher==pytest.approx(run.stages[0]['frame'].group2.iloc[-1], rel=1e-4) and by_teacher!=pytest.approx(by_itself, rel=1e-3)
    assert list(fit(distill_learner(dls, teacher, student), 1, head=0, mode='parallel', validate=False).fed)==['fed by itself']

def test_norms_have_the_statistics_of_what_they_are_fed(dls, fit):
    "After a parallel stage, those of the student by itself, in one pass over the training data"
    student,seen = wrn(10, 1),[]
    learn = distill_learner(dls, wrn(16, 1), student)
    fit(learn, 1, head=0, mode='parallel')
    bn = student.group2[0].bn1
    student.eval()
    handle = bn.register_forward_pre_hook(lambda m,i: seen.append(i[0].mean((0,2,3))))
    student.group1.train()
    with torch.no_grad():
        for b in dls.train: student(b[0].as_subclass(Tensor))
    handle.remove()
    own,teachers = torch.stack(seen).mean(0),bn.running_mean
    assert (own-teachers).norm()<.2*own.norm()

def test_rectified_students_get_rectified_targets(dls, fit):
    teacher,student = resnet(10, stem='small'),resnet(10, width=.25, stem='small')
    look = Look(lambda cb: [(o.min().item(), o.mean().item()) for o in cb.pred])
    fit(distill_learner(dls, teacher, student), [1], head=0, mode='parallel', cbs=look, stem=False)
    assert all(low>=0 for o in look.kept for low,_ in o)
    assert all(1.5<mean<2.5 for o in look.kept for _,mean in o[1::2])

# What fastai does

def test_the_first_batches_are_those_of_any_fit(teacher, quiet):
    def first_batch(how, *args, **kwargs):
        set_seed(3)
        look = Look(lambda cb: cb.x.clone())
        quiet(distill_learner(few_digits(), teacher, partial(wrn, 10, 1)), *args, how=how, cbs=look, **kwargs)
        return look.kept[0]
    plain = first_batch('fit', 1)
    for mode in ('stagewise','parallel'): assert torch.equal(first_batch('fit_blocks', 1, head=0, mode=mode), plain)

def test_fit_one_cycle_goes_on(learn, quiet, fit):
    fit(learn, 1, head=1)
    before = states(learn.student)
    quiet(learn, 1, 1e-3, how='fit_one_cycle')
    assert changed(before, learn.student)=={'stem',*stages,'bn','fc'} and learn.recorder.history['kd'][0]>0
    assert len(learn.opt.param_lists[0])==len([*learn.student.parameters()])
    learn.export_student(Path(tempfile.mkdtemp())/'s.pkl')

def test_terms_act_on_the_classifier_alone(dls, teacher, fit):
    learn = distill_learner(dls, teacher, partial(wrn, 10, 1), cbs=[KD(),FitNet()], metrics=accuracy)
    model,adapters = learn.model,dict(adapters_of(learn.model))
    look = Look(lambda cb: hasattr(cb.learn, 'kd'))
    run = fit(learn, 1, head=2, cbs=look)
    n = len(dls.train)
    assert look.kept==[False]*3*n+[True]*2*n
    assert learn.model is model and all(adapters_of(learn.model)[k] is v for k,v in adapters.items())
    history = learn.recorder.history
    assert (history.kd[3:]>0).all() and history.kd[:3].isna().all() and (history.hint[:3]>0).all() and history.hint[3:].isna().all()
    assert [*history.stage]==[*stages,'classifier','classifier'] and len(learn.recorder.losses)==len(learn.recorder.lrs)==5*n
    assert list(learn.recorder.iters)==[n*(i+1) for i in range(5)]
    assert len(run.plot().axes)==2 and len(run.plot().axes[0].lines)==6
    learn.recorder.plot_loss()

def test_without_a_term_the_classifier_learns_from_labels(learn, teacher, fit):
    learn.remove_cb(KD)
    calls = []
    handle = teacher.fc.register_forward_hook(lambda *_: calls.append(1))
    class Start(Callback):
        def before_fit(self): calls.clear()
    fit(learn, 0, head=2, cbs=Start())
    handle.remove()
    assert not calls and 'kd' not in learn.recorder.history and any(isinstance(o, TeacherCallback) for o in learn.cbs)

@pytest.mark.parametrize('mode', ['stagewise','simultaneous','parallel'])
def test_bfloat16(mode, learn, fit):
    look = Look(lambda cb: (cb.learn.loss_grad.dtype, torch.is_autocast_enabled('cpu'), cb.learn.model.training))
    seen = []
    handle = learn.student.group1.register_forward_hook(lambda m,i,o: seen.append(o.dtype))
    run = fit(learn.to_bf16(), 1, head=1, mode=mode, cbs=look)
    handle.remove()
    assert {o[0] for o in look.kept}=={torch.float32} and torch.bfloat16 in seen
    assert not torch.is_autocast_enabled('cpu') and {p.dtype for p in learn.model.parameters()}=={torch.float32}
    assert run.history.hint.notna().any()

@pytest.mark.parametrize('mix', [MixUp, CutMix])
def test_mixed_images_have_their_own_hints(mix, dls, teacher, fit):
    learn = distill_learner(dls, teacher, partial(wrn, 10, 1), cbs=[KD(), mix(1.)], precision='float32')
    def gap(cb):
        with torch.no_grad(), torch.random.fork_rng(): t = teacher.eval().group1(teacher.stem(cb.x.as_subclass(Tensor)))
        return (t-cb.pred[1]).abs().max().item()
    look = Look(gap)
    loss_func = learn.loss_func
    fit(learn, [1,0,0], head=1, cbs=[])
    fit(learn, [1,0,0], head=0, cbs=look)
    assert max(look.kept)<1e-4 and learn.loss_func is loss_func

def test_gradients_accumulate(quiet):
    "Two halves of a batch give the gradient of the whole"
    images = torch.randint(0, 255, (32,3,32,32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    teacher = wrn(10, 1)
    class Keep(Callback):
        order,first = 100,None
        def before_train(self):
            for m in self.learn.model.modules():
                if isinstance(m, nn.BatchNorm2d): m.eval()
        def after_backward(self): self.first = self.first or [p.grad.clone() for p in self.learn.student.parameters() if p.grad is not None]
        def before_step(self):
            self.grads = torch.cat([p.grad.flatten() for p in self.learn.student.parameters() if p.grad is not None])
            raise CancelFitException("enough")
    def grads(bs, *cbs):
        set_seed(3)
        keep = Keep()
        quiet(distill_learner(tensor_dls(*((images, torch.arange(32)%10),)*2, bs=bs), teacher, partial(wrn, 10, 1)), [1,0,0], how='fit_blocks', head=0, cbs=[keep,*cbs])
        return keep.grads,torch.cat([o.flatten() for o in keep.first])
    (whole,_),(halves,half) = grads(32),grads(16, GradientAccumulation(32))
    assert (whole-halves).norm()<1e-4*whole.norm() and (whole-half).norm()>.1*whole.norm()

def test_callbacks_of_every_kind(dls, teacher, fit, tmp_path):
    learn = distill_learner(dls, teacher, partial(wrn, 10, 1), metrics=accuracy, path=tmp_path, cbs=[KD(), CSVLogger()])
    best = SaveModelCallback(monitor='accuracy', fname='head')
    fit(learn, 2, head=3, cbs=[best, SaveModelCallback(fname='stage')])
    text = (tmp_path/'history.csv').read_text().splitlines()
    assert sum(o.startswith('epoch,') for o in text)==4 and len(text)==4+3*2+3
    assert not learn.csv_logger.append
    assert best.best==max(learn.recorder.history.accuracy.dropna())
    for name in ('head','stage'): assert wrn(10, 1).load_state_dict({k:v for k,v in torch.load(tmp_path/f'models/{name}.pth').items()}) is not None
    assert [type(o) for o in learn.cbs].count(CSVLogger)==1

def test_the_best_epoch_of_a_stage_is_loaded(learn, fit, tmp_path):
    learn.path = tmp_path
    kept = []
    class After(Callback):
        order = 100
        def after_epoch(self): kept.append((self.recorder.values[-1][1], states(self.learn.student)))
    fit(learn, [3,0,0], head=0, lr_max=3e-1, cbs=[SaveModelCallback(), After()])
    best = min(kept, key=itemgetter(0))[1]
    assert not {k for k,v in learn.student.state_dict().items() if not torch.equal(v, best[k])}

def test_callbacks_go_on_in_their_order(learn, fit):
    before = own_cbs(learn)
    fit(learn, 1, head=1, mode='simultaneous')
    assert own_cbs(learn)==before and all(o.learn is learn for o in before)

def test_epochs_and_rates_of_each_stage(learn, fit):
    run = fit(learn, [1,2,3], head=4, lr_max=[1e-3,2e-3,3e-3,4e-3])
    assert [len(o['frame']) for o in run.stages]==[1,2,3,4]
    assert [max(o['lrs']) for o in run.stages]==pytest.approx([1e-3,2e-3,3e-3,4e-3], rel=.05)
    assert repr(run)=='BlockFit of group1, group2, group3, classifier'

def test_validation_of_hints_can_be_left_out(learn, teacher, fit):
    run = fit(learn, 1, head=1, validate=False, cbs=SaveModelCallback(monitor='valid_loss'))
    assert 'valid_hint' not in run.history and run.history.valid_loss.notna().sum()==1 and learn.recorder.valid_metrics

def test_columns_of_several_hints(learn, fit):
    run = fit(learn, 1, head=1, mode='simultaneous')
    hints = run.history.loc[0, [*stages]]
    assert hints.mean()==pytest.approx(run.history.valid_hint[0], rel=1e-3)

def test_trackers_wait_for_their_column(learn, fit):
    stop = EarlyStoppingCallback('group3', patience=0, min_delta=1e9)
    run = fit(learn, 3, head=2, mode='simultaneous', cbs=stop)
    assert [len(o['frame']) for o in run.stages]==[2,2]
    with pytest.raises(ValueError, match="No stage has the column 'acuracy' that SaveModelCallback monitors"): fit(learn, 1, cbs=SaveModelCallback('acuracy'))

def test_files_of_a_stage_load_into_the_student(learn, fit, tmp_path):
    learn.path = tmp_path
    fit(learn, [0,0,1], head=0, cbs=SaveModelCallback(fname='stage'))
    before = states(learn.student)
    learn.load('stage', with_opt=False)
    assert not changed(before, learn.student)

@pytest.mark.parametrize('epochs,head,mode', [(1,0,'stagewise'), (1,0,'parallel'), (0,1,'stagewise')])
def test_averages_of_weights(epochs, head, mode, learn, teacher, fit):
    "As a callback keeps them, by a deep copy of the model, which does not copy the teacher"
    class Average(Callback):
        def before_fit(self): self.avg = torch.optim.swa_utils.AveragedModel(self.learn.model)
        def after_batch(self):
            if self.training: self.avg.update_parameters(self.learn.model)
        def after_train(self):
            with torch.no_grad(): a,b = (m.eval()(self.x) for m in (self.avg.module,self.learn.model))
            self.gap = [(x-y).abs().max().item() for x,y in zip(*map(listify, (a,b)))]
            self.hints = [getattr(o, 'hints', None) for o in (self.avg.module,self.learn.model)]
    average = Average()
    fit(learn, epochs, head=head, mode=mode, cbs=average)
    assert average.gap[0]>0 and bare_model(average.avg.module) is not learn.student
    if epochs: assert average.hints[0] is not None and average.hints[0] is average.hints[1]

# Students of other kinds

class Dropped(nn.Module):
    "A dropout that all blocks share, one that is a function, and norms that its own `train` keeps in eval"
    def __init__(self):
        super().__init__()
        self.a,self.na,self.b,self.nb,self.fc = nn.Conv2d(3, 8, 3, 2, 1),nn.BatchNorm2d(8),nn.Conv2d(8, 8, 3, 2, 1),nn.BatchNorm2d(8),nn.Linear(8, 10)
        self.drop,self.ta,self.tb,self.seen = nn.Dropout(.5),nn.Identity(),nn.Identity(),[]
    def forward(self, x):
        self.seen.append((self.training, self.drop.training))
        x = self.tb(self.drop(self.nb(self.b(self.ta(self.drop(self.na(self.a(x))))))))
        return self.fc(F.dropout(x, .5, self.training).mean((2,3)))
    def train(self, mode=True):
        super().train(mode)
        self.nb.training = False
        return self

def test_dropout_trains_and_a_train_of_ones_own_is_heeded(dls, fit):
    learn = distill_learner(dls, wrn(10, 1), Dropped())
    before,n = states(learn.student),len(dls.train)
    for epochs,head in ((1,0),(0,1)):
        learn.student.seen.clear()
        fit(learn, epochs, {'ta':'group2', 'tb':'group3'}, head=head, validate=False)
        assert sum(o==(True,epochs==1) for o in learn.student.seen)==(2*n if epochs else n)  # the shared dropout is not the classifier's
    moved = {k for k,v in learn.student.state_dict().items() if not torch.equal(v, before[k])}
    assert 'na.running_mean' in moved and 'nb.running_mean' not in moved and 'nb.weight' in moved

def test_frozen_blocks_can_be_left_out(learn, fit):
    learn.student.stem.requires_grad_(False), learn.student.group1.requires_grad_(False)
    before = states(learn.student)
    fit(learn, [0,1,1], head=1)
    assert changed(before, learn.student)=={'group2','group3','bn','fc'}

def test_a_student_that_begins_in_place(dls, fit):
    net = nn.Sequential(OrderedDict(r=nn.ReLU(inplace=True), **dict(wrn(10, 1).named_children())))
    assert fit(distill_learner(dls, wrn(10, 2), net), 1, head=1).history.hint.notna().sum()==3

@pytest.mark.parametrize('arch,n', [(resnet18,5), (mobilenet_v2(num_classes=10),2), (partial(resnet, 14),5), (residual_cnn,5), (partial(plain_cnn, 64),5)])
def test_any_student(arch, n, fit):
    y = torch.arange(20)%10
    dls = tensor_dls(*((torch.randint(0, 255, (20,3,64,64), dtype=torch.uint8), y),)*2, bs=10)
    learn = distill_learner(dls, resnet(14), arch)
    blocks = find_blocks(learn)
    assert len(blocks)-1>=n
    run = fit(learn, 1, head=1)
    assert len(run.stages)==len(blocks) and run.history.hint.notna().sum()==len(blocks)-1

def test_explicit_pairs_and_more_of_them(learn, dls, fit):
    run = fit(learn, 1, {'group1':'group1', 'group3':'group3'}, head=1)
    assert [o['name'] for o in run.stages]==['group1','group3','classifier']
    deep = distill_learner(dls, wrn(16, 1), wrn(16, 1))
    assert [b.tap for b in find_blocks(deep, per_stage=2)]==['group1.0','group1','group2.0','group2','group3.0','group3',None]

def test_a_layer_that_is_overwritten_is_copied(dls, fit):
    "A convolution before a ReLU in place, in both networks and fed"
    def net(): return nn.Sequential(OrderedDict(a=nn.Conv2d(3, 8, 3, 2, 1), ra=nn.ReLU(inplace=True), b=nn.Conv2d(8, 8, 3, 2, 1), rb=nn.ReLU(inplace=True), pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), fc=nn.Linear(8, 10)))
    for mode in ('simultaneous','parallel'):
        look = Look(lambda cb: [o.min().item() for o in cb.pred])
        fit(distill_learner(dls, net(), net()), 1, {'a':'a', 'b':'b'}, head=1, mode=mode, cbs=look)
        assert all(v<0 for o in look.kept[:len(dls.train)] for v in o)

# However it ends

class Stop(Exception): pass

@pytest.mark.parametrize('mode', ['stagewise','parallel'])
@pytest.mark.parametrize('event', ['before_fit','before_batch','after_pred','after_loss','before_step','after_train','before_validate','after_epoch'])
@pytest.mark.parametrize('n,error', [(1,Stop),(2,KeyboardInterrupt)], ids=['Stop','KeyboardInterrupt'])
def test_a_broken_stage_leaves_the_learner_as_it_was(mode, event, n, error, teacher, quiet, fit, tmp_path, capsys):
    learn = distill_learner(few_digits(10, per_class=2, valid=20), teacher, partial(wrn, 10, 1), cbs=[KD(), MixUp(), CSVLogger(tmp_path/'h.csv')], metrics=accuracy)
    if error is Stop: learn.to_bf16()
    quiet(learn, 1, 1e-3)
    learn.student.group1.requires_grad_(False)[0].conv1.weight.requires_grad_(True)
    learn.student.train()[0].eval()
    look = lambda: ([(p.requires_grad) for p in [*learn.student.parameters(),*teacher.parameters()]], [m.training for net in (learn.student,teacher) for m in net.modules()],
        learn.model, learn.loss_func, learn.opt, learn.splitter, [*learn.metrics], learn.logger, own_cbs(learn), learn.csv_logger.append)
    before = look()
    with pytest.raises(error): fit(learn, 1, head=1, mode=mode, cbs=Break(n, event, error))
    assert ('Interrupted. Stages done: ' in capsys.readouterr().err)==(error is KeyboardInterrupt)
    assert look()==before and n_hooks(teacher, learn.student)==0
    assert all(p.grad is None or not p.requires_grad for p in learn.student.parameters()) or all(p.grad is None for p in learn.student.parameters())
    assert not torch.is_autocast_enabled('cpu') or event in ('before_batch','after_pred')
    learn.student.requires_grad_(True)
    quiet(learn, 1, 1e-3)
    assert learn.recorder.history['kd'][0]>0

def test_a_broken_pass_for_statistics_leaves_them(learn, quiet, fit):
    quiet(learn, 1, 1e-3)
    bn,calls = learn.student.group3[0].bn1,[]
    class Start(Callback):
        "The pass comes after the fit"
        def after_fit(self): self.learn.kept,self.learn.handle = states(self.learn.student),learn.student.group1.register_forward_hook(stop)
    def stop(*_):
        calls.append(1)
        if len(calls)==2: raise KeyboardInterrupt("as asked")
    with pytest.raises(KeyboardInterrupt): fit(learn, 1, head=0, mode='parallel', validate=False, cbs=Start())
    learn.handle.remove()
    assert not changed(learn.kept, learn.student) and bn.momentum==.1 and bn.running_mean.abs().sum()>0

def test_what_is_overwritten_in_training_is_found(dls, fit):
    def net(): return nn.Sequential(OrderedDict(a=nn.Conv2d(3, 8, 3, 2, 1), d=nn.Dropout(.5, inplace=True), b=nn.Conv2d(8, 8, 3, 2, 1), pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), fc=nn.Linear(8, 10)))
    for mode in ('parallel','simultaneous'):
        with pytest.raises(ValueError, match='in-place dropout'): fit(distill_learner(dls, net(), net()), 1, {'a':'a', 'b':'b'}, mode=mode)

# Bad input, before anything is changed

class TwiceTapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.a,self.relu,self.b,self.fc = nn.Conv2d(3, 8, 3, 2, 1),nn.ReLU(),nn.Conv2d(8, 8, 3, 2, 1),nn.Linear(8, 10)
    def forward(self, x): return self.fc(self.relu(self.b(self.relu(self.a(x)))).mean((2,3)))

def frozen(d):
    learn = distill_learner(d, wrn(10, 2), wrn(10, 1), splitter=lambda m: L([*m.stem.parameters(), *m.group1.parameters()], [*m.group2.parameters(), *m.group3.parameters(), *m.bn.parameters(), *m.fc.parameters()]))
    learn.freeze()
    return learn

class Shares(nn.Module):
    "One convolution in both blocks"
    def __init__(self, norm=False):
        super().__init__()
        self.a,self.b,self.fc = nn.Conv2d(3, 3, 3, 2, 1),nn.Conv2d(3, 3, 3, 2, 1),nn.Linear(3, 10)
        self.both = nn.BatchNorm2d(3, affine=False) if norm else nn.Conv2d(3, 3, 1)
        self.ta,self.tb = nn.Identity(),nn.Identity()
    def forward(self, x): return self.fc(self.tb(self.both(self.b(self.ta(self.both(self.a(x)))))).mean((2,3)))

class Skips(nn.Module):
    "The second block sees the image"
    def __init__(self):
        super().__init__()
        self.a,self.b,self.fc = nn.Conv2d(3, 8, 3, 2, 1),nn.Conv2d(11, 8, 3, 2, 1),nn.Linear(8, 10)
    def forward(self, x): return self.fc(self.b(torch.cat([self.a(x), F.avg_pool2d(x, 2)], 1)).mean((2,3)))

class SideBySide(nn.Module):
    def __init__(self):
        super().__init__()
        self.a,self.b,self.fc = nn.Conv2d(3, 8, 3, 2, 1),nn.Conv2d(3, 8, 3, 2, 1),nn.Linear(8, 10)
    def forward(self, x): return self.fc((self.a(x)+self.b(x)).mean((2,3)))

class NothingBetween(nn.Sequential):
    def __init__(self): super().__init__(OrderedDict(a=nn.Conv2d(3, 8, 3, 2, 1), b=nn.MaxPool2d(2), pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), fc=nn.Linear(8, 10)))

halves = {'a':'group2', 'b':'group3'}
bad = {
    'no teacher':        (lambda d: distill_learner(d, None, wrn(10, 1)), dict(n_epoch=1), "needs a teacher"),
    'plain learner':     (lambda d: Learner(d, wrn(10, 1)), dict(n_epoch=1), "distill_learner(dls, teacher, student)"),
    'one pair':          (None, dict(n_epoch=1, pairs={'group1':'group1'}), "at least two pairs"),
    'no pairs':          (None, dict(n_epoch=1, pairs={}), "at least two pairs"),
    'pairs of no dict':  (None, dict(n_epoch=1, pairs=['group1','group2']), "{'student.layer': 'teacher.layer'"),
    'student out of order': (None, dict(n_epoch=1, pairs={'group2':'group2', 'group1':'group1'}), "out of turn"),
    'teacher out of order': (None, dict(n_epoch=1, pairs={'group1':'group3', 'group2':'group1'}), "different order"),
    'unknown layer':     (None, dict(n_epoch=1, pairs={'grup1':'group1', 'group2':'group2'}), "did you mean 'group1'"),
    'unknown mode':      (None, dict(n_epoch=1, mode='paralel'), "mode must be one of stagewise"),
    'a list too short':  (None, dict(n_epoch=[1,1]), "one for each of 3 stages, got 2"),
    'rates too few':     (None, dict(n_epoch=1, lr_max=[1e-3,1e-3]), "one for each of 4 stages, got 2"),
    'no epochs':         (None, dict(n_epoch=0), "at least one of them above 0"),
    'half an epoch':     (None, dict(n_epoch=.5), "whole numbers"),
    'shared parameters': (lambda d: distill_learner(d, wrn(10, 2), Shares()), dict(n_epoch=1, pairs={'ta':'group2', 'tb':'group3'}), "blocks share 'both.bias'"),
    'shared statistics': (lambda d: distill_learner(d, wrn(10, 2), Shares(norm=True)), dict(n_epoch=1, pairs={'ta':'group2', 'tb':'group3'}), "blocks share 'both',"),
    'a skip connection': (lambda d: distill_learner(d, wrn(10, 2), Skips()), dict(n_epoch=1, pairs=halves), "cannot be cut at 'a'"),
    'side by side':      (lambda d: distill_learner(d, wrn(10, 2), SideBySide()), dict(n_epoch=1, pairs=halves), "cannot be cut at 'a'"),
    'nothing to train':  (lambda d: distill_learner(d, wrn(10, 2), NothingBetween()), dict(n_epoch=1, pairs=halves), "'b' has no trainable parameters: leave that pair out"),
    'frozen block':      (lambda d: (lambda o: (o.student.group2.requires_grad_(False), o)[1])(distill_learner(d, wrn(10, 2), wrn(10, 1))), dict(n_epoch=1), "learn.unfreeze() first"),
    'no classifier':     (lambda d: (lambda o: ([m.requires_grad_(False) for m in (o.student.bn,o.student.fc)], o)[1])(distill_learner(d, wrn(10, 2), wrn(10, 1))), dict(n_epoch=1), "classifier has no trainable parameters"),
    'frozen learner':    (frozen, dict(n_epoch=1), "learn.unfreeze() first"),
    'a teacher\'s layer twice': (lambda d: distill_learner(d, TwiceTapped(), wrn(10, 1)), dict(n_epoch=1, pairs={'group2':'a', 'group3':'relu'}), "more than once"),
    'an optimizer made': (lambda d: (lambda s: distill_learner(d, wrn(10, 2), s, opt_func=OptimWrapper(s.parameters(), torch.optim.AdamW)))(wrn(10, 1)), dict(n_epoch=1), "partial(OptimWrapper"),
    'terms as callbacks': (None, dict(n_epoch=1, cbs=AT()), "pass them to distill_learner"),
    'too wide to feed':  (lambda d: distill_learner(d, wrn(10, 1), wrn(10, 2)), dict(n_epoch=1, mode='parallel'), "at least as wide"),
    'sizes that differ': (None, dict(n_epoch=1, pairs={'group1':'group2', 'group2':'group3'}, mode='parallel'), "maps of one size"),
    'never called':      (None, dict(n_epoch=1, pairs={'group3':'group2', 'unused':'group3'}), "'unused' was not called"),
}

@pytest.mark.parametrize('case', bad)
def test_bad_input_changes_nothing(case, dls):
    make,kwargs,message = bad[case]
    student = wrn(10, 1)
    if case=='never called':
        student.unused = nn.Conv2d(64, 64, 1)
        student.forward = lambda x: student.fc(student.flat(student.pool(student.act(student.bn(student.group3(student.group2(student.group1(student.stem(x)))))))))
    learn = make(dls) if make else distill_learner(dls, wrn(10, 2), student)
    learn.student.train()
    before,model,cbs,flags = states(learn.model),learn.model,[*learn.cbs],[p.requires_grad for p in learn.student.parameters()]
    with pytest.raises(ValueError) as e: learn.fit_blocks(**kwargs)
    assert message in str(e.value), e.value
    assert learn.model is model and [*learn.cbs]==cbs and [p.requires_grad for p in learn.student.parameters()]==flags and n_hooks(model)==0
    assert not changed(before, learn.model) and all(m.training for m in learn.student.modules())

def test_images_keep_their_memory_format_where_torch_would_crash():
    "In the backward pass of a 1x1 convolution of stride 2 with fewer than 8 channels"
    x = torch.zeros(2, 3, 8, 8)
    for o in (x, x.contiguous(memory_format=torch.channels_last)):
        assert [laid_out((o,), wrn(10, k))[0].is_contiguous(memory_format=torch.channels_last) for k in (1,.5,.25)]==[True,True,False]

class Columns(Callback):
    "Gives images in channels last, as loaders in memory do that crop"
    order = 50
    def before_batch(self): self.learn.xb = tuple(o.contiguous(memory_format=torch.channels_last) for o in self.xb)

def test_a_narrow_student_gets_images_in_rows(quiet):
    seen = {}
    class Sees(Callback):
        order = 101
        def before_batch(self): seen.setdefault((self.learn.k,self.training), self.xb[0].is_contiguous(memory_format=torch.channels_last))
    learners = {k: distill_learner(few_digits(), wrn(10, 2), wrn(10, k), cbs=[KD(), Columns(), Sees()]) for k in (1,.25)}
    learners['labels'] = classifier_learner(few_digits(), wrn(10, .25), cbs=[Columns(), Sees()])
    for k,learn in learners.items():
        learn.k = k
        quiet(learn, 1)
    assert seen=={(1,True):True, (1,False):True, (.25,True):False, (.25,False):True, ('labels',True):False, ('labels',False):True}

@pytest.mark.slow
def test_a_narrow_student_is_trained():
    "In a process of its own, which would crash on processors with AVX2 alone"
    code = "from test_blocks import *; torch.set_num_threads(1); " \
        "[distill_learner(few_digits(), wrn(10, 2), wrn(10, .25+.75*slim), cbs=[KD(),o(),*[Slimmable()]*slim]).fit(2) for slim in (0,1) for o in (Columns,ChannelsLast)]"
    debug = Path('/lib/x86_64-linux-gnu/libc_malloc_debug.so.0')
    checks = dict(LD_PRELOAD=debug.name, MALLOC_CHECK_='3') if debug.exists() else {}
    env = dict(os.environ, ONEDNN_MAX_CPU_ISA='AVX2', PYTHONPATH=os.pathsep.join([str(Path(__file__).parent), os.environ.get('PYTHONPATH', '')]), **checks)
    res = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, timeout=200, env=env)
    assert res.returncode==0, res.stderr

@pytest.mark.slow
def test_a_narrow_student_is_trained_in_blocks():
    "In a process of its own, which would crash"
    code = "from fastai.vision.all import *; from kdfast.all import *; dls = digits_dls(20, per_class=8, size=16, valid=60); " \
        "learn = distill_learner(dls, wrn(10, 2), wrn(10, .25)); [learn.fit_blocks(2, head=1, mode=o) for o in ('stagewise','parallel')]"
    res = subprocess.run(warm.command('-W', 'ignore', '-c', code), capture_output=True, text=True, timeout=200)
    assert res.returncode==0, res.stderr
