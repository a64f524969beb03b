"What fastai does with a learner, it does with one that distils: each test asserts what the feature promises"
import pytest, torch._dynamo.testing, torchvision
from conftest import few_digits, n_hooks
from contextlib import nullcontext
from fastai.vision.all import *
from kdfast.all import *
from kdfast.layers.adapters import Adapted, bare_model
from torchvision.models import resnet18

class Watch(Callback):
    "What every training batch shows, when all terms have been added"
    order = 5
    def __init__(self): self.values = []
    def after_loss(self):
        if self.training: self.values.append({t.label: t.value.item() for t in self.learn.teacher.terms})

def count_forwards(module):
    calls = []
    return calls,module.register_forward_hook(lambda m,i,o: calls.append(i[0]) if len(i[0])>2 else None)  # not the probes of two images

def weights(m): return torch.cat([p.detach().flatten().clone() for p in m.parameters()])

@pytest.mark.parametrize('terms', [[KD], [AT], [KD,AT], [KD,AT,FitNet], [FitNet,AT,KD,AT]], ids=lambda o: '+'.join(c.__name__ for c in o))
def test_one_teacher_forward_a_batch(terms, dls, teacher, quiet):
    watch = Watch()
    learn = distill_learner(dls, teacher, partial(wrn, 10, 1), cbs=[*(t() for t in terms), watch], metrics=accuracy)
    calls,handle = count_forwards(teacher.stem)  # AT does not come to the classifier
    quiet(learn, 2, 1e-3)
    assert len(calls)==2*len(dls.train)==len(watch.values)
    assert all(len(v)==len(terms) and all(o>0 for o in v.values()) for v in watch.values)
    names = learn.recorder.metric_names
    assert list(names[4:-1])==[t.label for t in learn.teacher.terms] and len(set(names))==len(names)
    assert all(len(v)==len(names)-2 and all(o>0 for o in v[3:]) for v in learn.recorder.values)
    assert len(learn.validate())==2
    learn.get_preds()
    learn.path = Path(tempfile.mkdtemp())
    learn.export()
    assert len(calls)==2*len(dls.train)
    assert n_hooks(teacher, learn.student)==1  # the one of this test

def test_column_is_the_mean_of_the_batches(dls, teacher, quiet):
    watch = Watch()
    learn = quiet(distill_learner(dls, teacher, partial(wrn, 10, 1), cbs=[AT(), watch]), 1, 1e-3)
    assert learn.recorder.history['at'][0]==pytest.approx(np.mean([v['at'] for v in watch.values]), rel=1e-4)

def test_csv_logger(dls, teacher, quiet, tmp_path):
    learn = quiet(distill_learner(dls, teacher, partial(wrn, 10, 1), cbs=[KD(), AT(), CSVLogger()], path=tmp_path, metrics=accuracy), 2, 1e-3)
    log = learn.csv_logger.read_log()
    assert list(log)==['epoch','train_loss','valid_loss','accuracy','kd','at','time']
    assert (log[['kd','at']]>0).all(axis=None)

def test_control_equals_a_plain_learner(dls, quiet):
    def fit(make):
        set_seed(3)
        return weights(quiet(make(few_digits(20, per_class=8), wrn(10, 1)), 1, 1e-3).model)
    assert torch.equal(fit(lambda d,s: distill_learner(d, None, s)), fit(Learner))

def test_same_seed_same_batches(teacher, quiet):
    def seen(t, cbs=None):
        set_seed(3)
        xs,learn = [],distill_learner(few_digits(20, per_class=8), t, partial(wrn, 10, 1), cbs=cbs)
        class See(Callback):
            def after_pred(self): xs.append(self.xb[0].clone())
        quiet(learn, 2, 1e-3, cbs=See())
        return torch.stack([x.sum() for x in xs])
    control = seen(None)
    assert torch.equal(control, seen(teacher)) and torch.equal(control, seen(teacher, [FitNet(),AT()]))

def test_lr_find(dls, teacher):
    learn = distill_learner(dls, teacher, partial(wrn, 10, 1), cbs=[KD(),FitNet()], path=tempfile.mkdtemp())
    before,(calls,handle) = weights(learn.model),count_forwards(teacher)
    with learn.no_bar(): res = learn.lr_find(num_it=8, show_plot=False)
    handle.remove()
    assert 1e-7 < res.valley < 10
    assert torch.equal(before, weights(learn.model))
    assert len(calls) in (8,9) and n_hooks(teacher, learn.student)==0
    assert teacher.training

@pytest.mark.slow
def test_fine_tune_and_flat_cos(dls, teacher, quiet):
    "A vision_learner with its splitter, to which distillation is added after its optimizer was made"
    learn = vision_learner(dls, resnet18, pretrained=False, metrics=accuracy)
    learn.freeze()
    groups = len(learn.opt.param_lists)
    learn.add_cbs([TeacherCallback(teacher), FitNet({'0.4':'group3'}), KD()])
    body = learn.model[0][0].weight.clone()
    quiet(learn, 1, 1e-3)
    assert torch.equal(body, bare_model(learn.model)[0][0].weight)
    adapter = learn.model.adapters['fitnet_0_4']
    assert len(learn.opt.param_lists)==groups
    assert {id(p) for p in adapter.parameters()} <= {id(p) for p in learn.opt.param_lists[-1]}
    start = adapter[0].weight.detach().clone()
    quiet(learn, 1, how='fine_tune')
    assert not torch.equal(start, adapter[0].weight) and not torch.equal(body, bare_model(learn.model)[0][0].weight)
    quiet(learn, 2, how='fit_flat_cos')
    assert list(learn.recorder.metric_names[4:-1])==['fitnet','kd'] and all(v[3]>0 and v[4]>0 for v in learn.recorder.values)

def test_terms_for_one_fit(dls, teacher, quiet):
    learn = Learner(dls, wrn(10, 1), metrics=accuracy)
    quiet(learn, 1, 1e-3)
    assert learn.opt is not None
    quiet(learn, 1, how='fit_one_cycle', cbs=[TeacherCallback(teacher), FitNet()])
    assert learn.recorder.values[0][3]>0
    adapter = learn.model.adapters['fitnet_group1'][0].weight
    assert any(adapter is p for p in learn.opt.param_lists[-1]) and learn.opt.state[adapter]
    quiet(learn, 1, 1e-3)
    assert list(learn.recorder.metric_names)==['epoch','train_loss','valid_loss','accuracy','time']

def test_torch_optimizer(dls, teacher, quiet):
    learn = Learner(dls, wrn(10, 1), opt_func=partial(OptimWrapper, opt=torch.optim.SGD))
    quiet(learn, 1, 1e-3)
    learn.add_cbs([TeacherCallback(teacher), FitNet()])
    quiet(learn, 1, 1e-3)
    start = learn.model.adapters['fitnet_group1'][0].weight.detach().clone()
    quiet(learn, 1, 1e-3)
    assert not torch.equal(start, learn.model.adapters['fitnet_group1'][0].weight)

def test_splitter_sees_the_bare_student(dls, teacher, quiet):
    seen = []
    def halves(m):
        seen.append(m)
        return L(m[:2], m[2:]).map(params)
    learn = distill_learner(dls, teacher, wrn(10, 1), cbs=FitNet(), splitter=halves)
    quiet(learn, 1, slice(1e-4, 1e-3))
    assert seen[0] is learn.student and len(learn.opt.param_lists)==2
    assert len(learn.opt.param_lists[1])==len(params(learn.student[2:]))+len(params(learn.model.adapters))

def test_channels_last(dls, teacher, quiet):
    seen = []
    class See(DistillCallback):
        def choose(self, *_): self.layers = {'group2':'group2'}
        def term(self):
            seen.extend(o['group2'].is_contiguous(memory_format=torch.channels_last) for o in (self.source.taps,self.source.student_taps))
            return torch.zeros(())
    learn = distill_learner(dls, teacher, wrn(10, 1), cbs=[See(),KD()])
    learn.to_channelslast(use_amp=False)
    quiet(learn, 1, 1e-3)
    assert seen and all(seen)

def test_bf16_is_computed_and_closed(dls, teacher, quiet):
    class Stop(Callback):
        def after_pred(self): raise KeyboardInterrupt
    learn = distill_learner(dls, teacher, wrn(10, 1), cbs=[KD(),FitNet()]).to_bf16()
    with pytest.raises(KeyboardInterrupt): quiet(learn, 1, cbs=Stop())
    assert not torch.is_autocast_enabled('cpu')
    learn.path = Path(tempfile.mkdtemp())
    learn.export()
    assert load_learner(learn.path/'export.pkl').get_preds(dl=dls.valid)[0].shape==(60,10)
    types = set()
    handle = learn.student.group3.register_forward_hook(lambda m,i,o: types.add(o.dtype))
    quiet(learn, 1, 1e-3)
    assert types=={torch.bfloat16} and not {'_do_one_batch','one_batch'} & {*vars(learn)}
    handle.remove()
    assert learn.to_fp32() is learn and not [c for c in learn.cbs if isinstance(c, MixedPrecision)]
    learn.student.group3.register_forward_hook(lambda m,i,o: types.add(('fp32', o.dtype)))
    quiet(learn, 1, 1e-3)
    assert ('fp32',torch.float32) in types and ('fp32',torch.bfloat16) not in types

@pytest.mark.parametrize('event', ['before_batch','after_pred','after_loss','before_step'])
@pytest.mark.parametrize('exc', [KeyboardInterrupt,CancelBatchException])
def test_bf16_is_closed_wherever_a_batch_ends(event, exc, dls, quiet):
    "Also where other callbacks still prepare it, and in validation"
    learn,after = Learner(dls, wrn(10, 1)).to_bf16(),[]
    class Stop(Callback):
        order = BF16.order+1
        def __init__(self): setattr(self, event, self._stop)
        def _stop(self): raise exc('stop')
        def after_batch(self): after.append(torch.is_autocast_enabled('cpu'))
    for run in (lambda: quiet(learn, 1, cbs=Stop()), lambda: learn.validate(cbs=Stop())):
        try:
            with learn.no_bar(): run()
        except KeyboardInterrupt: pass
        assert not torch.is_autocast_enabled('cpu') and not any(after)
    quiet(learn, 1, 1e-3)

@pytest.mark.parametrize('mix', [MixUp,CutMix])
def test_teacher_sees_the_mixed_batch(mix, dls, teacher, quiet):
    learn = distill_learner(dls, teacher, partial(wrn, 10, 1), cbs=[mix(), KD(), AT()])
    seen,_ = count_forwards(teacher)
    student,_ = count_forwards(learn.student)
    quiet(learn, 1, 1e-3)
    assert all(torch.equal(a, b) for a,b in zip(seen, student[:len(seen)]))
    assert learn.recorder.values[0][2]>0 and len(seen)==len(dls.train)

def test_gradient_accumulation_steps_once(dls, teacher, quiet):
    "The weights after one accumulated step are those after one step on the mean gradient"
    steps = []
    learn = distill_learner(dls, teacher, partial(wrn, 10, 1), cbs=[KD(),AT(),GradientAccumulation(40)], opt_func=SGD)
    class Count(Callback):
        def after_step(self): steps.append(self.iter)
    quiet(learn, 1, 1e-3, cbs=Count())
    assert steps==[1,3]

def test_gradient_clip_includes_adapters(dls, teacher, quiet):
    norms = []
    class Norm(Callback):
        order = GradientClip.order+1
        def before_step(self): norms.append(nn.utils.clip_grad_norm_(self.learn.model.parameters(), 1e9).item())
    learn = distill_learner(dls, teacher, partial(wrn, 10, 1), cbs=[FitNet(),GradientClip(.1),Norm()])
    quiet(learn, 1, 1e-3)
    assert len(norms)==len(dls.train) and all(n<=.1001 for n in norms)

def test_save_model_restores_the_best_epoch(dls, teacher, quiet, tmp_path):
    class Keep(Callback):
        def before_validate(self):
            if self.epoch==1: self.student,self.adapters = weights(self.learn.student),weights(self.learn.model.adapters)
    def told(pred, y): return [.5,.9,.1][learn.epoch]
    learn = distill_learner(dls, teacher, partial(wrn, 10, 1), cbs=[KD(),FitNet(),Keep()], metrics=told, path=tmp_path)
    quiet(learn, 3, 3e-3, cbs=SaveModelCallback(monitor='told'))
    assert torch.equal(weights(learn.student), learn.keep.student) and torch.equal(weights(learn.model.adapters), learn.keep.adapters)
    state = torch.load(tmp_path/'models/model.pth')
    state = state.get('model', state)
    assert set(state)==set(wrn(10, 1).state_dict())
    other = Learner(dls, wrn(10, 1), path=tmp_path).load('model')
    assert torch.equal(weights(other.model), weights(learn.student))
    adapters = weights(learn.model.adapters)
    for p in learn.model.adapters.parameters(): nn.init.zeros_(p)
    assert torch.equal(weights(learn.load('model').model.adapters), adapters)

def test_early_stopping_monitors_a_term(dls, teacher, quiet):
    learn = distill_learner(dls, teacher, partial(wrn, 10, 1), cbs=[AT(), EarlyStoppingCallback(monitor='at', comp=np.less, min_delta=1e9, patience=2)])
    quiet(learn, 9, 1e-3)
    assert len(learn.recorder.values)==3 and n_hooks(teacher, learn.student)==0

def test_early_stopping_alone_still_distils(dls, teacher, quiet):
    learn = distill_learner(dls, teacher, wrn(10, 1), cbs=EarlyStoppingCallback(patience=9))
    quiet(learn, 1, 1e-3)
    assert learn.recorder.metric_names[3]=='kd' and learn.recorder.values[0][2]>0

def test_a_plan_is_made_once(dls, teacher, quiet):
    "Fits, tables and validation share it, until something that it was made for is another, adapters included"
    learn = distill_learner(dls, teacher, wrn(10, 1), cbs=[KD(),FitNet()])
    plan,adapters,seen = learn.teacher.plan,[*learn.fitnet.adapters.values()],[]
    handle = learn.student.register_forward_hook(lambda m,i,o: seen.append(len(o)))
    learn.show_distill()
    quiet(learn, 2, 1e-3)
    with learn.no_bar(): learn.validate()
    assert learn.teacher.plan is plan and seen and 2 not in seen
    handle.remove()
    learn.model = learn.student
    quiet(learn, 1, 1e-3)
    assert learn.teacher.plan is not plan and len(learn.fitnet.adapters)==len(adapters)==3
    assert {id(m) for m in (*learn.fitnet.adapters.values(), learn.fitnet.balance)}=={id(m) for m in learn.model.adapters.values()}

@pytest.mark.slow
def test_a_compiled_student_is_tapped(dls, teacher, quiet):
    "Hooks that stand through an epoch are part of the graph, which is compiled for training, for validation and for a last batch"
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    learn,same = (distill_learner(dls, teacher, deepcopy(s), cbs=[KD(),AT()], precision='float32') for s in [wrn(10, 1)]*2)
    learn.model.compile(backend=counter)
    for o in (learn,same):
        set_seed(0)
        dls.train.rng.seed(0)
        quiet(o, 2, 1e-3)
    assert 1<=counter.frame_count<=5 and n_hooks(learn.student)==0
    assert learn.recorder.history.values==pytest.approx(same.recorder.history.values, rel=1e-3)

@pytest.mark.slow
@pytest.mark.parametrize('term', [AT,FitNet])
def test_a_network_that_has_run_compiled_is_tapped(term, dls, teacher, quiet):
    "torch takes for granted that what it has compiled gets no hooks later; in training mode, and in eval mode, which this student does not tell from it"
    torch._dynamo.reset()
    plain,values = deepcopy(wrn(10, 1).eval()),[]
    for m in plain.modules(): m.train = lambda mode=True, m=m: m
    for compiled in (False,True):
        net = deepcopy(plain)
        if compiled:
            net.compile(backend='eager')
            net(dls.one_batch()[0].as_subclass(Tensor))
        set_seed(0)
        dls.train.rng.seed(0)
        learn = distill_learner(dls, teacher, net, cbs=term(), precision='float32')
        quiet(learn, 2, 1e-3)
        with learn.no_bar(): learn.validate()
        values.append(weights(learn.student))
        assert n_hooks(learn.student)==0
    assert torch.allclose(*values, atol=1e-5)

def test_data_parallel_copies_are_not_tapped(dls, teacher, quiet):
    for terms,refused in ((KD,False),(AT,True)):
        learn = distill_learner(dls, teacher, nn.DataParallel(wrn(10, 1)), cbs=terms())
        learn.model.device_ids = [0,1]  # as on a machine with two GPUs
        learn.model.forward = learn.student.forward
        with pytest.raises(ValueError, match='DistributedDataParallel') if refused else nullcontext(): quiet(learn, 1, 1e-3)
        assert n_hooks(learn.student)==0

def test_an_empty_training_loader(teacher):
    dls = few_digits(20, per_class=8)
    dls.loaders[0] = DataLoader([dls.train_ds[0]], bs=4, drop_last=True)
    for t in (teacher,None):
        learn = distill_learner(dls, t, wrn(10, 1), loss_func=CrossEntropyLossFlat())
        with pytest.raises(ValueError, match='has no batches'), learn.no_bar(): learn.fit(1)

def test_save_and_load(dls, teacher, quiet, tmp_path):
    make = lambda t,cbs=None: distill_learner(dls, t, wrn(10, 1), cbs=cbs, path=tmp_path)
    learn = quiet(make(teacher, FitNet()), 1, 1e-3)
    learn.save('hints')
    other = make(teacher, FitNet()).load('hints')
    assert torch.equal(weights(other.model), weights(learn.model))
    assert [other.opt.state[p]['step'] for p in other.model.parameters()]==[learn.opt.state[p]['step'] for p in learn.model.parameters()]
    control = quiet(make(None), 1, 1e-3)
    control.save('control')
    adapters = weights(other.model.adapters)
    other.load('control', with_opt=False)
    assert torch.equal(weights(other.student), weights(control.student)) and torch.equal(adapters, weights(other.model.adapters))
    control.load('hints', strict=False, with_opt=False)
    assert torch.equal(weights(control.student), weights(learn.student))

def test_predict_and_show_results(dls, teacher, quiet):
    learn = quiet(distill_learner(dls, teacher, partial(wrn, 10, 1), cbs=[KD(),FitNet()], metrics=accuracy), 1, 1e-3)
    preds,targets = learn.get_preds()
    assert preds.shape==(60,10) and torch.allclose(preds.sum(1), torch.ones(60), atol=1e-4)
    image = np.array(Image.fromarray(dls.valid_ds.tls[0].tfms.fs[0].images[0].permute(1,2,0).numpy()))
    with learn.no_bar():
        label,idx,probs = learn.predict(image)
        learn.show_results(max_n=4)
    assert label==dls.vocab[preds[0].argmax()] and torch.allclose(probs, preds[0], atol=1e-4)

def test_export(dls, quiet, tmp_path):
    "With 20 million parameters attached, and adapters, the file holds the student and some names"
    big,sizes,learns = resnet(34, stem='small'),[],[]
    for teacher,cbs in ((None,None), (big,None), (big,[KD(),AT(),FitNet()])):
        set_seed(1)
        learn = quiet(distill_learner(dls, teacher, wrn(10, 1), cbs=cbs, path=tmp_path), 0)
        learn.export()
        sizes.append((tmp_path/'export.pkl').stat().st_size)
    assert max(sizes)-sizes[0] < 3000
    loaded = load_learner(tmp_path/'export.pkl')
    assert torch.equal(loaded.get_preds(dl=dls.valid)[0], learn.get_preds(dl=dls.valid)[0])
    assert not isinstance(loaded.model, Adapted)
    assert isinstance(learn.model, Adapted)

def test_export_student(dls, teacher, quiet, tmp_path):
    learn = quiet(distill_learner(dls, teacher, wrn(10, 1), cbs=[KD(),FitNet()], path=tmp_path, metrics=accuracy), 1, 1e-3)
    before = learn.cbs.copy()
    file = learn.export_student('out/student.pkl')
    assert file==tmp_path/'out/student.pkl' and [o.name for o in file.parent.iterdir()]==['student.pkl']
    served = load_learner(file)
    assert torch.equal(served.get_preds(dl=dls.valid)[0], learn.get_preds(dl=dls.valid)[0])
    assert learn.cbs==before and isinstance(learn.model, Adapted)
    old = file.read_bytes()
    learn.loss_func = type('Local', (nn.CrossEntropyLoss,), {'__reduce__': lambda self: 1/0})()
    with pytest.raises(ZeroDivisionError): learn.export_student('out/student.pkl')
    assert file.read_bytes()==old and len(list(file.parent.iterdir()))==1

def test_teacher_learner_from_file(dls, quiet, tmp_path):
    "The classes are checked, and the teacher's own normalization is used"
    teacher = quiet(Learner(dls, wrn(10, 2), path=tmp_path), 1, 1e-3)
    teacher.export()
    other = few_digits(20, per_class=8)
    for dl in other.loaders:
        i = next(i for i,f in enumerate(dl.after_batch.fs) if isinstance(f, Normalize))
        dl.after_batch.fs[i] = Normalize.from_stats(*imagenet_stats, cuda=False)
    learn = distill_learner(other, tmp_path/'export.pkl', wrn(10, 1))
    x = other.valid.one_batch()[0].as_subclass(Tensor)
    raw = x*tensor(imagenet_stats[1])[:,None,None] + tensor(imagenet_stats[0])[:,None,None]
    theirs = (raw-tensor(digits_stats[0])[:,None,None])/tensor(digits_stats[1])[:,None,None]
    net = learn.teacher.network.eval()
    assert torch.allclose(learn.teacher.see(x), net(theirs), atol=1e-4)
    assert distill_learner(dls, teacher, wrn(10, 1)).teacher.tfm is None
    half = lambda x: x/2
    for o in (teacher, tmp_path/'export.pkl'):  # what the user adds comes after what the teacher's normalization asks for
        assert distill_learner(dls, o, wrn(10, 1), tfm=half).teacher.tfm is half
        assert torch.allclose(distill_learner(other, o, wrn(10, 1), tfm=half).teacher.see(x), net(theirs/2), atol=1e-4)

def test_other_data_in_a_learner(quiet):
    "Where `learn.dls` is set, the teacher's inputs and the choice of its outputs follow, and classes that it lacks are named"
    first,other = few_digits(20, per_class=8),few_digits(20, per_class=8)
    teacher = Learner(first, wrn(10, 2))
    learn = quiet(distill_learner(first, teacher, wrn(10, 1), precision='float32'), 1, 1e-3)
    assert learn.teacher.tfm is None and learn.teacher.picks is None
    for dl in other.loaders:
        i = next(i for i,f in enumerate(dl.after_batch.fs) if isinstance(f, Normalize))
        dl.after_batch.fs[i] = Normalize.from_stats(*imagenet_stats, cuda=False)
    other.vocab = [*reversed(first.vocab)]
    learn.dls = other
    quiet(learn, 1, 1e-3)
    x = other.valid.one_batch()[0].as_subclass(Tensor)
    raw = x*tensor(imagenet_stats[1])[:,None,None] + tensor(imagenet_stats[0])[:,None,None]
    theirs = (raw-tensor(digits_stats[0])[:,None,None])/tensor(digits_stats[1])[:,None,None]
    net = teacher.model.eval()
    assert torch.allclose(learn.teacher.picked(learn.teacher.see(x)), net(theirs).flip(1), atol=1e-4)
    other.vocab = [*first.vocab[:-1],'a new one']
    learn.dls = DataLoaders(*other.loaders)
    learn.dls.vocab = other.vocab
    with pytest.raises(ValueError, match='lacks the classes a new one'): quiet(learn, 1, 1e-3)
    assert n_hooks(learn.student, net)==0

def test_segmentation_logits(quiet):
    "A map of logits for each image; the teacher and the student are fully convolutional"
    n = lambda c: nn.Sequential(nn.Conv2d(3, c, 3, padding=1), nn.ReLU(), nn.Conv2d(c, 5, 1))
    x,y = torch.randn(24,3,16,16),torch.randint(0, 5, (24,16,16))
    dls = DataLoaders(*(DataLoader(list(zip(x, y)), bs=8) for _ in range(2)))
    learn = quiet(distill_learner(dls, n(16), n(4), loss_func=CrossEntropyLossFlat(axis=1)), 2, 1e-3)
    assert all(v[2]>0 for v in learn.recorder.values)

def test_the_probe_draws_no_random_number(dls):
    "Not even with a teacher that does so in its forward"
    class Noisy(nn.Sequential):
        def forward(self, x): return super().forward(x + .1*torch.rand_like(x))
    teacher,student = Noisy(wrn(10, 2)),wrn(10, 1)
    before = torch.get_rng_state(),random.getstate(),dls.train.rng.getstate()
    Learner(dls, student, cbs=[TeacherCallback(teacher), KD(), FitNet({'group1':'0.group1'})])
    assert torch.equal(before[0], torch.get_rng_state()) and before[1:]==(random.getstate(),dls.train.rng.getstate())

def test_plain_torch_loaders(teacher, quiet):
    x,y = torch.randn(40,3,32,32),torch.randint(0, 10, (40,))
    dls = DataLoaders(*(torch.utils.data.DataLoader(list(zip(x, y)), batch_size=8) for _ in range(2)))
    learn = distill_learner(dls, teacher, wrn(10, 1), loss_func=CrossEntropyLossFlat(), cbs=[KD(),FitNet()]).to_bf16()
    quiet(learn, 1, 1e-3)
    assert all(v>0 for v in learn.recorder.values[0][2:])

def test_a_text_classifier(quiet):
    "KD and a function of embeddings need no image"
    class Reader(nn.Module):
        def __init__(self, h):
            super().__init__()
            self.emb,self.rnn,self.out = nn.Embedding(50, h),nn.LSTM(h, h, batch_first=True),nn.Linear(h, 3)
        def forward(self, x): return self.out(self.rnn(self.emb(x))[0][:,-1])
    x,y = torch.randint(0, 50, (40,12)),torch.randint(0, 3, (40,))
    dls = DataLoaders(*(DataLoader(list(zip(x, y)), bs=8) for _ in range(2)))
    cbs = [KD(), FeatureKD(lambda s,t: (s.std()-t.std())**2, {'emb':'emb'})]
    learn = quiet(distill_learner(dls, Reader(16), Reader(8), loss_func=CrossEntropyLossFlat(), cbs=cbs), 1, 1e-3)
    assert list(learn.recorder.metric_names[3:-1])==['kd','feature'] and all(v>0 for v in learn.recorder.values[0][2:])

@pytest.fixture
def downloaded(tmp_path, monkeypatch):
    "ResNet-18's ImageNet weights where torch.hub keeps what it has downloaded; these are random ones"
    set_seed(3)
    weights = resnet18().state_dict()
    file = tmp_path/'hub/checkpoints'/torchvision.models.ResNet18_Weights.DEFAULT.url.split('/')[-1]
    file.parent.mkdir(parents=True)
    torch.save(weights, file)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    return weights

def moved(before, after): return [n for n,p in after.named_parameters() if not torch.equal(p, before[n])]

def test_a_pretrained_student_learns_with_all_its_layers(downloaded, dls, teacher, quiet):
    "From its weights, in the groups of `vision_learner`, and frozen only while `fine_tune` freezes it"
    learn = distill_learner(dls, teacher, resnet18, pretrained=True, cbs=[KD(),AT()])
    assert torch.equal(learn.student[0][0].weight, downloaded['conv1.weight']) and all(p.requires_grad for p in learn.student.parameters())
    before = {n:p.clone() for n,p in learn.student.named_parameters()}
    quiet(learn, 1, 1e-3)
    assert len(learn.opt.param_lists)==3 and len(moved(before, learn.student))==len(before)
    learn = distill_learner(dls, teacher, resnet18, pretrained=True)
    frozen = []
    class Watch(Callback):
        def before_step(self): frozen.append(not next(self.learn.student.parameters()).requires_grad)
    quiet(learn, 1, how='fine_tune', cbs=Watch())
    half = len(frozen)//2
    assert all(frozen[:half]) and not any(frozen[half:])

@pytest.mark.parametrize('adapted', [False,True])
def test_a_learner_as_student(adapted, dls, teacher, quiet):
    student = vision_learner(dls, resnet18, pretrained=False)
    student.freeze()
    learn = distill_learner(dls, teacher, student, cbs=[FitNet()] if adapted else None)
    before = {n:p.clone() for n,p in student.model.named_parameters()}
    quiet(learn, 1, 1e-3)
    assert learn.student is student.model and len(learn.opt.param_lists)==3 and len(moved(before, learn.student))==len(before)
    own = distill_learner(dls, teacher, student, splitter=trainable_params)
    own.create_opt()
    assert len(own.opt.param_lists)==1

def test_frozen_parameters_are_told(dls, teacher):
    student = vision_learner(dls, resnet18, pretrained=False)
    student.freeze()
    with pytest.warns(UserWarning, match='20 parameters of the student are frozen and will not train'): distill_learner(dls, teacher, student.model)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        distill_learner(dls, teacher, wrn(10, 1))
