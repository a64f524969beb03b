"What only a GPU can break. Without one, what a CPU can do of it is tested there: `pytest -m cuda`"
import pytest
from conftest import few_digits, n_hooks
from fastai.vision.all import *
from kdfast.all import *
from kdfast.devices import autocast_dtype
from kdfast.experiments.run import Run, do_run
from kdfast.experiments.spec import as_published, methods, terms_of

pytestmark = [pytest.mark.cuda, pytest.mark.slow]
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
names = [n for n in methods() if n!='sigmoidkd']

@pytest.fixture(autouse=True)
def exact():
    "Convolutions in float32, not TF32"
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False): yield

def images(bs=20, per_class=4, pad=0, **kwargs): return few_digits(bs, per_class, pad=pad, device=device, **kwargs)

def far(a, b): return ((a.float().cpu()-b.float().cpu()).norm()/b.float().cpu().norm()).item()

def places(*modules): return {t.device.type for m in modules for t in (*m.parameters(), *m.buffers())}

def term(name):
    "A method without its ramp, at whose beginning it has no weight"
    res, = terms_of(name)
    if callable(res.weight): res.weight = res.weight(1.)
    return res

def learner(teacher, *terms, student=None, dls=None, **kwargs):
    return distill_learner(dls or images(), teacher if any(getattr(t, 'taught', False) for t in terms) else None, student or wrn(10, 1), cbs=[*terms], **kwargs)

# Devices

@pytest.mark.parametrize('name', names)
def test_each_method_stays_on_the_device(name, trained, quiet):
    "Adapters, peers, memories and the copy of the teacher move there; the teacher's weights and mode are as they were"
    teacher = deepcopy(trained)
    before,t = {k:v.clone() for k,v in teacher.state_dict().items()},term(name)
    learn = quiet(learner(teacher, t), 1, 1e-3)
    assert places(learn.model)=={device.type} and math.isfinite(learn.recorder.history[t.label].iloc[0])
    assert not t.taught or places(learn.teacher.frozen.net)=={device.type}
    assert all(torch.equal(v.cpu(), before[k]) for k,v in teacher.state_dict().items()) and n_hooks(teacher, learn.student)==0

@pytest.mark.parametrize('name', ['kd','at','fitnet','ofd','crd','simkd'])
def test_gradients_are_those_of_a_cpu(name, trained, quiet):
    class Keep(Callback):
        def before_step(self):
            self.grads = torch.cat([p.grad.flatten().cpu() for p in self.learn.student.parameters() if p.grad is not None])
            raise CancelFitException
    def grads(device):
        set_seed(0)
        dls,keep = few_digits(20, 4, pad=0, device=device),Keep()
        dls.train.rng.seed(0)
        quiet(learner(deepcopy(trained), term(name), keep, student=wrn(10, 1), dls=dls, precision='float32', opt_func=SGD), 1, 1e-3)
        return keep.grads
    assert far(grads(device), grads(torch.device('cpu')))<1e-3

@pytest.mark.parametrize('how', ['fit_blocks','fit_two_stages'])
def test_stages(how, trained, quiet):
    learn = learner(deepcopy(trained), FitNet(), KD())
    if how=='fit_blocks': quiet(learn, 1, head=1, how=how)
    else: quiet(learn, 1, 1, 1e-3, how=how)
    assert places(learn.model)=={device.type} and n_hooks(learn.model)==0

def test_the_student_leaves_the_device(trained, tmp_path, quiet):
    "An export is read on a CPU, and predicts what it did"
    learn = quiet(learner(deepcopy(trained), KD(), FitNet(), path=tmp_path), 1, 1e-3)
    back,x = load_learner(learn.export_student()).model,images().one_batch()[0].as_subclass(Tensor)
    with torch.no_grad(): assert places(back)=={'cpu'} and far(back.eval()(x.cpu()), learn.student.eval()(x))<1e-3

def test_what_is_shown(trained):
    learn,x = learner(deepcopy(trained), KD(), AT()),images().one_batch()[0]
    assert learn.show_distill() and learn.show_pairs(x) is not None
    assert count_macs(learn.student, 32)>1e6 and len(compare(dict(student=learn.student), 32))==1

# Precision

@pytest.mark.parametrize('precision,tol', [('float32',1e-4), ('auto',.05), ('bf16',.05), ('fp16',.02), (None,1e-5)])
def test_precisions_of_the_teacher(precision, tol, trained):
    x = images().one_batch()[0].as_subclass(Tensor)
    try: autocast_dtype(precision or 'float32', device)
    except ValueError: pytest.skip(f'{device.type} does not compute {precision}')
    net = deepcopy(trained).to(device).eval()
    out,maps = Frozen(net, (x[:2],), ['group1','group3'], precision=precision)(x)
    with torch.no_grad(), Taps(net, ['group1','group3']) as t: exact = net(x),dict(t.outs)
    assert far(out, exact[0])<tol and all(far(maps[o], exact[1][o])<tol for o in maps)

@pytest.mark.parametrize('how', ['to_bf16', pytest.param('to_fp16', marks=gpu)])
@pytest.mark.parametrize('name', ['kd','at','fitnet','crd','kdsvd','factortransfer','ofd'])
def test_mixed_precision(how, name, trained, quiet):
    "The student computes in half precision, and losses are close to those in float32"
    def fit(how):
        set_seed(0)
        dls,seen = images(),set()
        dls.train.rng.seed(0)
        learn = learner(deepcopy(trained), term(as_published(name)), student=wrn(10, 1), dls=dls, opt_func=SGD)
        learn.student.group2[0].conv1.register_forward_hook(lambda m,i,out: seen.add(out.dtype))
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            return quiet(getattr(learn, how)(), 1, 1e-4).recorder.history[name].iloc[0],seen
    (half,dtypes),(full,_) = fit(how),fit('to_fp32')
    assert half==pytest.approx(full, rel=.1) and dict(to_bf16=torch.bfloat16, to_fp16=torch.float16)[how] in dtypes

@pytest.mark.parametrize('precision', ['float32','auto'])
def test_a_compiled_teacher(precision, trained):
    x = images().one_batch()[0].as_subclass(Tensor)
    exact,ours = (Frozen(deepcopy(trained), (x[:2],), ['group1','group2'], precision=precision, compile=o) for o in (False,True))
    (out,maps),(out2,maps2) = exact(x),ours(x)
    tol = 1e-3 if precision=='float32' else .05
    assert far(out2, out)<tol and all(far(maps2[o], maps[o])<tol for o in maps)
    assert hasattr(ours.ask, '_torchdynamo_orig_callable') and not hasattr(exact.ask, '_torchdynamo_orig_callable')

@gpu
def test_a_copy_in_half_precision(trained):
    "Nothing falls back to what is slower: bfloat16, channels last, folded norms"
    x = images().one_batch()[0].as_subclass(Tensor)
    frozen = Frozen(deepcopy(trained), (x[:2],))
    assert frozen.dtype is torch.bfloat16 and frozen.last and any(isinstance(m, nn.Identity) for m in frozen.net.modules())

@gpu
def test_int8_is_for_cpus(trained, quiet):
    with pytest.raises(ValueError, match='needs one input on a CPU'): quiet(learner(deepcopy(trained), KD(), precision=int8_teacher), 1)

# Data

@pytest.mark.parametrize('views', [0,2])
def test_a_cache(views, trained, tmp_path, quiet):
    "The fit from a cache is the fit that made it, on images that are augmented on the device, and runs no teacher"
    def fit():
        set_seed(0)
        dls,teacher,calls = images(pad=4*bool(views)),deepcopy(trained),[]
        teacher.stem.register_forward_hook(lambda m,i,out: calls.append(1) if len(out)>2 else None)
        dls.train.rng.seed(0)
        learn = quiet(learner(teacher, KD(), AT(), TeacherCache(tmp_path/'c', views), student=wrn(10, 1), dls=dls), 2, 1e-3)
        return torch.cat([p.detach().flatten().cpu() for p in learn.student.parameters()]),len(calls)
    (first,n),(second,none) = fit(),fit()
    assert far(first, second)<1e-3 and n>0==none

def test_augmentation_in_memory():
    "Each shifted image is the image in another place, each mirrored one is it or its mirror, each crop has its values"
    x = TensorImage(torch.randint(1, 256, (64,3,16,16), dtype=torch.uint8, device=device))
    padded = F.pad(x.as_subclass(Tensor), [2]*4)
    places = torch.stack([padded[..., i:i+16, j:j+16] for i in range(5) for j in range(5)])
    shifted = BatchShift(2).encodes(x)
    found = (places==shifted).flatten(2).all(2)
    assert found.any(0).all() and found.any(1).sum()>10 and shifted.device.type==device.type
    flipped = BatchFlip().encodes(x)
    same,mirrored = ((flipped==o).flatten(1).all(1) for o in (x.as_subclass(Tensor), x.as_subclass(Tensor).flip(-1)))
    assert (same|mirrored).all() and same.any() and mirrored.any() and flipped.is_contiguous()
    cropped = BatchResizedCrop(8).encodes(x)
    assert cropped.shape==(64,3,8,8) and cropped.dtype==torch.uint8 and cropped.device.type==device.type

@pytest.mark.parametrize('workers', [0,2])
def test_loaders_of_files(workers, trained, tmp_path, quiet):
    "Batches come through pinned memory and fastai's transforms"
    for i,(x,y) in enumerate(few_digits(1, per_class=4).train_ds):
        (tmp_path/str(int(y))).mkdir(exist_ok=True)
        to_image(x).save(tmp_path/str(int(y))/f'{i}.png')
    dls = ImageDataLoaders.from_folder(tmp_path, valid_pct=.2, seed=0, bs=8, num_workers=workers, pin_memory=device.type=='cuda', item_tfms=Resize(32), batch_tfms=aug_transforms(size=32), device=device)
    learn = quiet(learner(deepcopy(trained), KD(), AT(), dls=dls), 1, 1e-3)
    assert places(learn.model)=={device.type} and learn.recorder.history['at'].iloc[0]>0

@gpu
def test_another_stream(trained, quiet):
    "A fit in a stream of its own ends as in the default one"
    def fit():
        set_seed(0)
        dls = images(pad=2)
        dls.train.rng.seed(0)
        learn = quiet(learner(deepcopy(trained), KD(), AT(), student=wrn(10, 1), dls=dls, precision='float32'), 1, 1e-3)
        return torch.cat([p.detach().flatten() for p in learn.student.parameters()])
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream): ours = fit()
    stream.synchronize()
    assert far(ours, fit())<1e-3

# Costs

@gpu
def test_crd_needs_no_gather_of_negatives(quiet):
    "16,384 negatives of 128 numbers for 64 images would be 537 MB"
    x = torch.randint(256, (20_000,3,32,32), dtype=torch.uint8)
    dls = tensor_dls((x, torch.arange(20_000)%10), (x[:64], torch.arange(64)%10), bs=64, stats=digits_stats, device=device)
    def peak(*terms):
        learn = learner(wrn(10, 2), *terms, ShortEpochCallback(.01), dls=dls)
        torch.cuda.reset_peak_memory_stats()
        quiet(learn, 1, 1e-3)
        return torch.cuda.max_memory_allocated()
    assert peak(CRD())-peak(KD())<2e8

# Processes

class Converted(Callback):
    "Norms become synchronized ones once the layers have been found, where fastai does it"
    order = 11
    def before_fit(self): self.learn.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.learn.model)

@gpu
def test_sync_batchnorm_in_one_process(trained, tmp_path, quiet):
    "Norms that are converted after the layers were found are still read"
    torch.distributed.init_process_group('nccl', init_method=f'file://{tmp_path}/group', rank=0, world_size=1)
    try:
        learn = quiet(learner(deepcopy(trained), KD(), AT(), OFD(), Converted()), 1, 1e-3)
        assert all(learn.recorder.history[o].iloc[0]>0 for o in ('kd','at','ofd')) and any(isinstance(m, nn.SyncBatchNorm) for m in learn.model.modules())
    finally: torch.distributed.destroy_process_group()

def test_training_that_is_resumed(tmp_path):
    "Optimizer and random states come back to the device, and two of three epochs are left to do"
    class Stop(Callback):
        run_valid,n = False,0
        def __init__(self, at): self.at = at
        def after_batch(self):
            self.n += 1
            if self.epoch==self.at: raise KeyboardInterrupt
    run,net = Run(student='wrn-10-1', method='kd+at', teacher=Run(student='wrn-10-2', epochs=1, pct=.2), epochs=3, pct=.2),wrn(10, 2)
    whole = do_run(run, teacher=deepcopy(net))[1]
    with pytest.raises(KeyboardInterrupt): do_run(run, teacher=deepcopy(net), checkpoint=tmp_path/'cut.pth', cbs=Stop(1))
    rest = Stop(99)
    learn,again = do_run(run, teacher=deepcopy(net), checkpoint=tmp_path/'cut.pth', cbs=rest)
    assert rest.n==2*len(learn.dls.train) and places(learn.model)=={device.type} and again['history']['train_loss']==pytest.approx(whole['history']['train_loss'], rel=1e-3)
