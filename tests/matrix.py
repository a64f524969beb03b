"Whatever a user may combine: tasks, loaders, wrappers of networks, terms and verbs. Each cell gives the right number, by a loop written by hand, or an error of ours"
import inspect, sys, traceback
from dataclasses import dataclass, fields, replace
from fastai.vision.all import *
from kdfast.all import *
import kdfast
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

# Networks: three layers that every task has, `stem`, `deep` and `head`

@dataclass
class Out:
    logits:Tensor

forms = dict(tensor=noop, tuple=lambda o: (o,o.detach()), dict=lambda o: dict(logits=o, other=o.detach()), object=Out)
def logits(o): return o.logits if isinstance(o, Out) else o['logits'] if isinstance(o, dict) else o[0] if isinstance(o, tuple) else o

class Net(nn.Module):
    "`form`: what it outputs; `again`: whether `deep` is computed again in the backward pass, and by which of torch's ways"
    form,again = 'tensor',None
    def __init__(self, stem, deep, head):
        super().__init__()
        self.stem,self.deep,self.head = stem,deep,head

    def after(self, x):
        x = F.relu(x)
        x = self.deep(x) if self.again is None else checkpoint(self.deep, x, use_reentrant=self.again)
        return forms[self.form](self.head(F.relu(x)))

    def forward(self, x): return self.after(self.stem(x))

class Two(Net):
    "Of an image and a vector, or of categories and numbers"
    def __init__(self, more, *args):
        super().__init__(*args)
        self.more = more
    def forward(self, x, z): return self.after(self.stem(x) + self.more(z))

class Mean(nn.Module):
    def forward(self, x): return x.mean(1)

def pooled(h, c, nd=2): return nn.Sequential([nn.AdaptiveAvgPool1d,nn.AdaptiveAvgPool2d,nn.AdaptiveAvgPool3d][nd-1](1), nn.Flatten(), nn.Linear(h, c))

def conv_net(h, c, nd=2, c_in=3, head=pooled, two=None):
    conv = [nn.Conv1d,nn.Conv2d,nn.Conv3d][nd-1]
    norm = [nn.BatchNorm1d,nn.BatchNorm2d,nn.BatchNorm3d][nd-1]
    parts = conv(c_in, h, 3, padding=1),nn.Sequential(conv(h, h, 3, padding=1, stride=1 if head is one_by_one else 2), norm(h)),head(h, c, nd)
    return Two(two, *parts) if two else Net(*parts)

def one_by_one(h, c, nd): return nn.Conv2d(h, c, 1)
class Column(nn.Module):
    "A vector as one number for each image"
    def __init__(self, n, h):
        super().__init__()
        self.lin = nn.Linear(n, h)
    def forward(self, z): return self.lin(z)[:,:,None,None]

def table_net(h, c): return Two(nn.Sequential(nn.Embedding(10, h), Mean()), nn.Linear(4, h), nn.Linear(h, h), nn.Linear(h, c))
def token_net(h, c): return Net(nn.Embedding(20, h), nn.Linear(h, h), nn.Sequential(Mean(), nn.Linear(h, c)))
def image_net(h, c): return conv_net(h, c)
def signal_net(h, c): return conv_net(h, c, 1, 2)
def volume_net(h, c): return conv_net(h, c, 3, 1)
def mask_net(h, c): return conv_net(h, c, head=one_by_one)
def pair_net(h, c): return conv_net(h, c, two=Column(4, h))

# Tasks

@dataclass
class Task:
    net:callable # Of a width and a number of outputs
    x:callable # Of a number of samples: tensors, one an input
    y:callable # The same: targets
    loss:callable
    c:int=4 # Outputs
    kind:str='classes' # What they mean
    ignored:int=None # A label that the loss leaves out
    types:tuple=(TensorImage,TensorCategory) # What fastai makes of them

def images(n): return torch.randn(n, 3, 8, 8),
def labels(n): return torch.randint(4, (n,))
def numbers(n): return torch.randn(n, 4)
def several(n): return torch.randint(2, (n,4)).float()
def one_mask(n): return torch.randint(2, (n,1,8,8)).float()
def some_mask(ignored, n):
    y = torch.randint(4, (n,8,8))
    y[:,:2] = ignored
    return y

def bce_and_dice(p, y):
    s = p.sigmoid()
    return F.binary_cross_entropy_with_logits(p, y) + 1-2*(s*y).sum()/(s.sum()+y.sum())

tasks = dict(
    one_label=Task(image_net, images, labels, CrossEntropyLossFlat()),
    torch_loss=Task(image_net, images, labels, nn.CrossEntropyLoss(label_smoothing=.1)),
    functional=Task(image_net, images, labels, F.cross_entropy),
    several_labels=Task(image_net, images, several, BCEWithLogitsLossFlat(), kind='labels', types=(TensorImage,TensorMultiCategory)),
    one_channel=Task(mask_net, images, one_mask, nn.BCEWithLogitsLoss(), 1, 'labels', types=(TensorImage,Tensor)),
    ignored_255=Task(mask_net, images, partial(some_mask, 255), CrossEntropyLossFlat(axis=1, ignore_index=255), ignored=255, types=(TensorImage,TensorMask)),
    ignored_0=Task(mask_net, images, partial(some_mask, 0), CrossEntropyLossFlat(axis=1, ignore_index=0), ignored=0, types=(TensorImage,TensorMask)),
    numbers=Task(image_net, images, numbers, MSELossFlat(), kind='numbers', types=(TensorImage,Tensor)),
    table=Task(table_net, lambda n: (torch.randn(n, 4),torch.randint(10, (n,3))), labels, CrossEntropyLossFlat(), types=(Tensor,TensorCategory)),
    int8_labels=Task(table_net, lambda n: (torch.randn(n, 4),torch.randint(10, (n,3))), lambda n: labels(n).to(torch.int8)[:,None], CrossEntropyLossFlat(), types=(Tensor,Tensor)),
    signals=Task(signal_net, lambda n: (torch.randn(n, 2, 32),), labels, CrossEntropyLossFlat(), types=(Tensor,TensorCategory)),
    volumes=Task(volume_net, lambda n: (torch.randn(n, 1, 4, 8, 8),), labels, CrossEntropyLossFlat(), types=(Tensor,TensorCategory)),
    tokens=Task(token_net, lambda n: (torch.randint(20, (n,12)),), labels, CrossEntropyLossFlat(), types=(Tensor,TensorCategory)),
    two_inputs=Task(pair_net, lambda n: (torch.randn(n, 3, 8, 8),torch.randn(n, 4)), labels, CrossEntropyLossFlat(), types=(Tensor,TensorCategory)),
)

# Loaders, none of which shuffles. Each gives `DataLoaders`, and the samples that an epoch trains on, batch by batch

class Skipping(list):
    "A list that has one sample nobody can open"
    def __getitem__(self, i):
        if i==2: raise SkipItemException
        return super().__getitem__(i)

def cut(samples, bs): return [samples[i:i+bs] for i in range(0, len(samples), bs)]

def fastai_loaders(task, train, valid, n_inp):
    rows,types = [*train,*valid],[*[task.types[0]]*n_inp, task.types[1]]
    tfms = [[partial(lambda i,k,t: t(rows[i][k]) if t is not Tensor else rows[i][k], k=k, t=t)] for k,t in enumerate(types)]
    splits = [*range(len(train))],[*range(len(train), len(rows))]
    return Datasets(range(len(rows)), tfms, splits=splits, n_inp=n_inp).dataloaders(bs=4, val_bs=4, shuffle=False)

def torch_loaders(task, train, valid, n_inp): return DataLoaders(*(torch.utils.data.DataLoader(o, batch_size=4) for o in (train,valid)))
def list_loaders(task, train, valid, n_inp): return DataLoaders(*(DataLoader(o, bs=4) for o in (train,valid)))
def skipping_loaders(task, train, valid, n_inp): return list_loaders(task, Skipping(train), valid, n_inp)
def few_loaders(task, train, valid, n_inp): return DataLoaders(DataLoader(train[:3], bs=4, drop_last=True), DataLoader(valid, bs=4))
def memory_loaders(task, train, valid, n_inp):
    split = lambda o: (torch.stack([x for x,*_ in o]), torch.stack([y for *_,y in o]))
    dls = tensor_dls(*(split(o) for o in (train,valid)), bs=4)
    dls.train.shuffle = False
    return dls

loaders = dict(fastai=fastai_loaders, torch=torch_loaders, list=list_loaders, skipping=skipping_loaders, last_of_one=list_loaders, few=few_loaders, memory=memory_loaders)

# Wrappers of a network, before a learner is made

def compiled(net):
    torch._dynamo.reset()
    return torch.compile(net, backend='eager')

def again(net, how):
    net.again = how
    return net

wrappers = dict(none=noop, compiled_before=compiled, compiled_after=noop, checkpointed=partial(again, how=False), reentrant=partial(again, how=True), traced=torch.fx.symbolic_trace,
    parallel=nn.DataParallel, averaged=AveragedModel, bf16=noop, half=lambda net: net.half(), cached=noop, ema=noop)

class EMA(Callback):
    "A mean of the student's weights that follows it"
    def before_train(self): self.learn.averaged = AveragedModel(self.learn.student, multi_avg_fn=get_ema_multi_avg_fn(.5))
    def after_step(self): self.learn.averaged.update_parameters(self.learn.student)

# Terms, and what they are by hand

def power(s, t): return (s.float().square().mean() - t.float().square().mean())**2

here = {'deep':'deep'}
terms = dict(default=lambda: [], feature=lambda: [FeatureKD(power, here, weight=1.)], at=lambda: [AT(here, weight=1e3)], fitnet=lambda: [FitNet(here, weight=100.)], kd_and_feature=lambda: [KD(),FeatureKD(power, here, weight=1.)],
    rkd=lambda: [RKD()], crd=lambda: [CRD()], dkd=lambda: [DKD()], similarity=lambda: [Similarity()], share=lambda: [FeatureKD(power, here, share=.3)], equal=lambda: [AT(here),FitNet(here)])
unchecked = 'rkd','crd','dkd','similarity','share','equal'  # by this test; tests of methods check their numbers

def positions(task, y, shape): return None if task.ignored is None else (y!=task.ignored).float()

def soft(task, s, t, y):
    "The term on outputs that each kind of task has by default: its value, and which part of the task's loss it replaces"
    if task.kind=='numbers': return F.mse_loss(s, t),0.
    if task.kind=='labels':
        p,q = s.sigmoid(),t.sigmoid()
        return (q*(q/p).log() + (1-q)*((1-q)/(1-p)).log()).mean(),0.
    p,q = (s/4).softmax(1),(t/4).softmax(1)
    kl,on = 16*(q*(q/p).log()).sum(1),positions(task, y, s.shape)
    return .9*(kl.mean() if on is None else (kl*on).sum()/on.sum()),.9

def attention(x): return F.normalize(x.abs().pow(2).mean(1).flatten(1))

def by_hand(task, name, s, t, fs, ft, y, adapters):
    "What terms add to the loss, and the part of the task's loss that they replace"
    added,part = soft(task, s, t, y) if name in ('default','kd_and_feature') else (0.,0.)
    if 'feature' in name: added = added + power(fs, ft)
    if name=='at':
        scale = 3*min(1, fs[0,0].numel()/49)
        added = added + 1e3*scale*(attention(fs)-attention(ft)).pow(2).mean()
    if name=='fitnet': added = added + 100*F.mse_loss(adapters['fitnet_deep'](fs), ft)
    return added,part

def features(net):
    seen = dict(deep=torch.zeros(()))  # a traced network has no such layer
    def keep(m, i, o): seen['deep'] = o
    return seen,net.deep.register_forward_hook(keep)

def loop(cell, task, student, teacher, batches, adapters, lr):
    "One epoch by hand: SGD on plain networks"
    teacher.eval()
    student.train()
    adapters.train()
    fs,ft = features(student)[0],features(teacher)[0]
    ema = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(.5))
    opt = torch.optim.SGD([*student.parameters(),*adapters.parameters()], lr=lr)
    for *xb,y in batches:
        with torch.autocast('cpu', torch.bfloat16, enabled=cell.wrapper=='bf16' and cell.whose=='student'):
            pred = student(*xb)
            with torch.no_grad(), torch.autocast('cpu', enabled=False): out = teacher(*xb)
            added,part = by_hand(task, cell.term, logits(pred).float(), logits(out).float(), fs['deep'].float(), ft['deep'].float(), y, adapters)
            loss = (1-part)*task.loss(pred, y.long() if y.dtype==torch.int8 else y) + added
        opt.zero_grad()
        loss.backward()
        opt.step()
        ema.update_parameters(student)
    for m in (student,teacher): m.deep._forward_hooks.clear()
    return ema

# Cells

@dataclass(frozen=True)
class Cell:
    task:str; loader:str; wrapper:str; whose:str; form:str; term:str; verb:str

verbs = 'fit','validate','get_preds','lr_find','interrupted','save','export_student','export_onnx','export_program','prune','factorize','quantize','compare','show_distill'
choices = dict(task=[*tasks], loader=[*loaders], wrapper=[*wrappers], whose=['student','teacher'], form=[*forms], term=[*terms], verb=[*verbs])

def sensible(c):
    "Whether a user can come to this"
    return not (c.wrapper in ('half','cached') and c.whose=='student' or c.wrapper=='ema' and c.whose=='teacher' or c.form=='object' and c.wrapper=='traced')

def ours(e):
    "Whether an error is one of kdfast's own, with a sentence"
    last = traceback.extract_tb(e.__traceback__)[-1]
    return Path(kdfast.__file__).parent in Path(last.filename).parents and 'raise' in last.line and len(str(e).split())>5

def weights(net, of): return torch.cat([o.detach().float().flatten() for n,o in sorted(of(net)) if o.is_floating_point()])

def far(now, right, before):
    "How far weights have gone astray, relative to the way they should have gone"
    return ((now-right).norm()/(right-before).norm().clamp(min=1e-12)).item()

class Seen(Callback):
    "The batches that training sees, before anything else does"
    order,run_valid = -100,False
    def __init__(self): self.batches = []
    def before_batch(self): self.batches.append(tuple(o.clone().as_subclass(Tensor) for o in (*self.xb,*self.yb)))

class Right:
    "A cell's learner, and what is right at each moment"
    def __init__(self, cell, path):
        set_seed(0)
        self.cell,self.task,self.path = cell,tasks[cell.task],path
        self.lr = 1e-3 if cell.term in ('at','fitnet') else .05
        n = 9 if cell.loader=='last_of_one' else 12
        self.train,self.valid = self.samples(n),self.samples(5)
        self.dls = loaders[cell.loader](self.task, self.train, self.valid, len(self.train[0])-1)
        nets = dict(student=self.task.net(4, self.task.c), teacher=self.task.net(8, self.task.c))
        nets[cell.whose].form = cell.form
        self.student,self.teacher = map(deepcopy, nets.values())
        if cell.form!='tensor' and cell.whose=='student': self.task = replace(self.task, loss=ReadsForm(self.task.loss))
        nets[cell.whose] = wrappers[cell.wrapper](nets[cell.whose])
        self.nets = nets

    def samples(self, n):
        x,y = self.task.x(n),self.task.y(n)
        if self.cell.loader=='memory' and self.cell.task in ('one_label','torch_loss','functional'): x = (x[0]*50+128).clamp(0, 255).byte(),
        return [*zip(*x, y)]

    def learner(self):
        c = self.cell
        cbs = [*terms[c.term](), Seen(), *([TeacherCache(self.path/'cache')] if c.wrapper=='cached' else []), *([EMA()] if c.wrapper=='ema' else [])]
        precision = 'bf16' if c.wrapper=='bf16' and c.whose=='teacher' else 'float32'
        learn = distill_learner(self.dls, self.nets['teacher'], self.nets['student'], cbs=cbs, loss_func=self.task.loss, precision=precision, opt_func=SGD, path=self.path)
        learn.teacher.every = 2  # what terms take is measured in a fit of three batches
        if c.wrapper=='bf16' and c.whose=='student': learn.to_bf16()
        if c.wrapper=='compiled_after':
            torch._dynamo.reset()
            (learn.model if c.whose=='student' else self.nets['teacher']).compile(backend='eager')
        return learn

    @property
    def tolerance(self): return .15 if self.cell.wrapper in ('bf16','half','cached') else 2e-3

    def fit(self, learn):
        "One epoch, checked against the loop"
        before,adapters = weights(self.student, nn.Module.named_parameters),nn.ModuleDict(deepcopy(dict(getattr(learn.model, 'adapters', {}))))
        with learn.no_bar(), learn.no_logging(): learn.fit(1, self.lr, wd=0.)
        batches = learn.seen.batches
        skipped = self.train if self.cell.loader!='skipping' else self.train[:2]+self.train[3:]
        assert sum(len(b[0]) for b in batches)==len(skipped), f"trained on {sum(len(b[0]) for b in batches)} samples, not {len(skipped)}"
        if self.cell.loader!='memory':
            for b,rows in zip(batches, cut(skipped, 4)):
                assert all(torch.equal(o, torch.stack(r)) for o,r in zip(b, zip(*rows))), "other samples than those of the loader"
        if self.cell.term in unchecked: return self.student.load_state_dict(plain(learn.student).state_dict())
        ema = loop(self.cell, self.task, self.student, deepcopy(self.teacher), batches, adapters, self.lr)
        pairs = [(plain(learn.student),self.student), *([(learn.averaged.module,ema.module)] if self.cell.wrapper=='ema' else [])]
        for now,right in pairs:
            off = far(weights(now, nn.Module.named_parameters), weights(right, nn.Module.named_parameters), before)
            assert off<self.tolerance, f"weights are off by {off:.3g}"
        self.student.load_state_dict(plain(learn.student).state_dict())

    def outputs(self, net):
        with torch.no_grad(): return torch.cat([logits(net(*xb)) for *xb,_ in self.batches()])

    def batches(self): return [tuple(o.as_subclass(Tensor) for o in b) for b in self.dls.valid]

def plain(net):
    "What a user wrapped"
    while not isinstance(net, (Net,torch.fx.GraphModule)): net = getattr(net, '_orig_mod', None) or getattr(net, 'module', None) or net.model
    return net

class ReadsForm:
    "A loss on the logits among a network's outputs"
    def __init__(self, loss): self.loss = loss
    def __call__(self, p, y): return self.loss(logits(p), y)

def close(a, b, tol): assert a.shape==b.shape and torch.allclose(a.float(), b.float(), rtol=tol, atol=tol), f"off by {(a-b).abs().max():.3g}"

# Verbs, after an epoch

def fit(r, learn):
    learn.seen.batches.clear()
    r.fit(learn)

def validate(r, learn):
    with learn.no_bar(): found = learn.validate()[0]
    r.student.eval()
    with torch.no_grad(): losses = [(len(y), r.task.loss(r.student(*xb), y.long() if y.dtype==torch.int8 else y).item()) for *xb,y in r.batches()]
    right = sum(n*l for n,l in losses)/sum(n for n,_ in losses)
    assert abs(found-right)<r.tolerance*max(1, abs(right)), f"{found}, not {right}"

def get_preds(r, learn):
    with learn.no_bar(): preds,targs = learn.get_preds(act=noop)
    close(logits(preds), r.outputs(r.student.eval()), r.tolerance)
    close(targs.as_subclass(Tensor), torch.cat([y for *_,y in r.batches()]), 0)

def save(r, learn):
    learn.save('there')
    net = r.task.net(4, r.task.c)
    other = Learner(r.dls, net, loss_func=r.task.loss, path=r.path).load('there')
    close(r.outputs(net.eval()), r.outputs(r.student.eval()), 1e-5)

def export_student(r, learn):
    net = load_learner(learn.export_student()).model
    close(r.outputs(net.eval()), r.outputs(r.student.eval()), r.tolerance)

def export_onnx(r, learn):
    import onnxruntime
    file = onnxruntime.InferenceSession(learn.export_onnx())
    for xb in [b[:-1] for b in r.batches()]:
        out = file.run(None, {i.name:x.numpy() for i,x in zip(file.get_inputs(), xb)})[0]
        with torch.no_grad(): close(torch.from_numpy(out), logits(r.student.eval()(*xb)), 1e-3)

def export_program(r, learn):
    program = torch.export.load(learn.export_program()).module()
    for *xb,_ in r.batches():
        with torch.no_grad(): close(logits(program(*xb)), logits(r.student.eval()(*xb)), 1e-3)

def lr_find(r, learn):
    "Leaves everything as it was"
    with learn.no_bar(): learn.lr_find(num_it=4, show_plot=False, start_lr=1e-3)
    assert torch.equal(*(weights(plain(o), nn.Module.named_parameters) for o in (learn.student,r.student)))
    fit(r, learn)

class Interrupt(Callback):
    def after_step(self): raise KeyboardInterrupt

def interrupted(r, learn):
    "Ctrl-C after a step; the next fit begins where that has come to"
    try:
        with learn.no_bar(), learn.no_logging(): learn.fit(1, r.lr, wd=0., cbs=Interrupt())
    except KeyboardInterrupt: pass
    learn.remove_cbs([cb for cb in learn.cbs if isinstance(cb, Interrupt)])
    assert not any(m._forward_hooks for m in learn.student.modules())
    r.student.load_state_dict(plain(learn.student).state_dict())
    fit(r, learn)

def smaller(r, learn, report):
    "After compression the learner still distils, by the numbers"
    net = plain(learn.student)
    assert sum(p.numel() for p in net.parameters())<sum(p.numel() for p in r.student.parameters())
    r.student = deepcopy(net)
    learn.seen.batches.clear()
    r.fit(learn)

def prune(r, learn): smaller(r, learn, learn.prune(.3))
def factorize(r, learn): smaller(r, learn, learn.factorize(ratio=.5))
def quantize(r, learn):
    learn.quantize()
    now,right = r.outputs(learn.model.eval()),r.outputs(r.student.eval())
    assert (now-right).norm()/right.norm()<.3, f"int8 is off by {(now-right).norm()/right.norm():.3g}"

def compare(r, learn):
    row = kdfast.all.compare(dict(student=learn.student), r.batches()[0][:-1], reps=1).loc['student']
    assert row.parameters==sum(p.numel() for p in r.student.parameters()) and row.MACs==count_macs(r.student, r.batches()[0][:-1])>0
    if r.task.kind!='classes': return
    found,n = agreement(learn).overall.loc['student','accuracy'],0
    preds,y = r.outputs(r.student.eval()).argmax(1),torch.cat([y for *_,y in r.batches()])
    assert abs(found-(preds==y).float().mean().item())<(.3 if r.tolerance>.1 else 1e-6)

def show_distill(r, learn):
    text = str(learn.show_distill())
    if r.cell.term=='default': assert f'Outputs: {r.task.kind}' in text, text

def fastais_own(e):
    "Whether fastai's own verbs stop so without kdfast"
    return isinstance(e, AttributeError) and "'DataLoader' object has no attribute 'new'" in str(e) and 'get_preds' in [o.name for o in traceback.extract_tb(e.__traceback__)]

def check(cell, path):
    "'right', or the error of ours that refuses a cell; raises `AssertionError` for anything else"
    r,said = None,'right'
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            r = Right(cell, path)
            state = {k:v.clone() for k,v in r.teacher.state_dict().items()}
            learn = r.learner()
            r.fit(learn)
            globals()[cell.verb](r, learn)
    except AssertionError: raise
    except Exception as e:
        if not (ours(e) or fastais_own(e)): raise
        said = str(e)
    if r is None: return said
    nets = [plain(o) for o in r.nets.values()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for net in nets for m in net.modules()), "hooks stay behind"
    now = plain(r.nets['teacher']).state_dict()
    assert all(torch.equal(now[k].float(), v.half().float() if cell.wrapper=='half' and v.is_floating_point() else v.float()) for k,v in state.items()), "the teacher has changed"
    assert not torch.is_autocast_enabled('cpu') and torch.is_grad_enabled()
    return said
