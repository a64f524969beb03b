"""What distillation costs: a step, an epoch, a cached epoch, a start, and how it grows. One table, all figures ratios

    python benchmarks/bench.py --cifar CIFAR --imagenette IMAGENETTE

Contestants of a row's group run in turns in one process, and medians are shown. The loop by hand returns features from its forward, has no hooks, asks its teacher in float32, and computes the same losses; before
anything is timed, kdfast's gradients with precision='float32' are compared with the loop's, and where they differ by more than 1e-5 nothing is printed. fasterai takes one callback a term and runs the teacher in
each; torchdistill has its own training box; both keep the formulas of their libraries. FitNet adapters are kdfast's and the loop's alone. Memory is the peak of what torch allocates in the first two steps of one
contestant, the copy of the teacher included. A machine with a GPU runs the same, on it."""
import gc, itertools, json, os, subprocess, sys, warnings
from argparse import ArgumentParser
from copy import copy, deepcopy
from importlib.metadata import version
from statistics import median
from time import perf_counter
warnings.filterwarnings('ignore')
os.environ.setdefault('KINETO_LOG_LEVEL', '5')  # the profiler's own messages
from fastai.vision.all import *
from torch.profiler import ProfilerActivity, profile
from kdfast.all import *
from kdfast.devices import native_bf16
from kdfast.layers.adapters import adapters_of
from kdfast.losses.core import at_loss, hint_loss, kd_loss

class Steps:
    "A loader that gives one batch `n` times"
    def __init__(self, batch, n): self.batch,self.n = batch,n
    def __len__(self): return self.n
    def __iter__(self): return (self.batch for _ in range(self.n))

# What is computed: networks, methods, and the loop by hand

class Work:
    "A teacher, a student and a batch"
    def __init__(self, name, teacher, student, size, bs, groups, device=None):
        self.name,self.groups,self.device = name,groups,device or default_device()
        self.teacher,self.student = teacher.to(self.device),student.to(self.device)
        self.batch = torch.randn(bs, 3, size, size, device=self.device),torch.randint(0, 10, (bs,), device=self.device)

    def features(self, net, x):
        "Logits and the outputs of the groups, without a hook"
        feats = []
        for n,m in net.named_children():
            x = m(x)
            if n in self.groups: feats.append(x)
        return x,feats

def works(): return [Work('WRN-40-2 to WRN-16-1, 32 px', wrn(40, 2), wrn(16, 1), 32, 64, ['group1','group2','group3']),
    Work('ResNet-34 to ResNet-10, 128 px', resnet(34), resnet(10), 128, 16, ['layer1','layer2','layer3','layer4'])]

at,hints = partial(AT, weight=1e3),partial(FitNet, weight=100.)  # published weights, as all contestants have them
methods = {'KD':(KD,), 'AT':(at,), 'KD+AT':(KD,at), 'FitNet':(hints,)}

def loop_loss(work, method, student, adapters, x, y):
    (out,feats),n = work.features(student, x),len(work.groups)
    with torch.no_grad(): t_out,t_feats = work.features(work.teacher, x)
    loss = F.cross_entropy(out, y)
    if 'KD' in method: loss = .1*loss + .9*kd_loss(out, t_out)
    if 'AT' in method: loss = loss + sum(3000/n*min(1, s[0,0].numel()/49)*at_loss(s, t) for s,t in zip(feats, t_feats))
    if 'FitNet' in method: loss = loss + sum(100/n*hint_loss(a(s) if a else s, t) for a,s,t in zip(adapters, feats, t_feats))
    return loss

def sgd(params, **kwargs): return SGD(params, lr=1e-5, mom=.9)

# Who computes it: each is called with a number of steps

class Loop:
    "Training written by hand"
    def __init__(self, work, loss, adapters=()):
        self.work,self.student,self.adapters,self.loss = work,deepcopy(work.student),[deepcopy(a) for a in adapters],loss
        self.opt = sgd([*self.student.parameters(), *(p for a in self.adapters if a for p in a.parameters())])
        work.teacher.eval()

    def __call__(self, n):
        self.student.train()
        for _ in range(n):
            self.loss(self.student, self.adapters, *self.work.batch).backward()
            self.opt.step()
            self.opt.zero_grad()

class Fastai:
    "Training by a learner"
    def __init__(self, work, teacher=None, cbs=(), half=False, **kwargs):
        dls = DataLoaders(Steps(work.batch, 1), Steps(work.batch, 0))
        dls.c,self.batch = 10,work.batch
        self.learn = distill_learner(dls, teacher, deepcopy(work.student), cbs=cbs, opt_func=sgd, loss_func=CrossEntropyLossFlat(), **kwargs)
        if half:
            self.learn.to_bf16()
            self.learn.model.to(memory_format=torch.channels_last)

    def __call__(self, n):
        self.learn.dls.loaders[0] = Steps(self.batch, n)
        with self.learn.no_bar(), self.learn.no_logging(): self.learn.fit(1, 1e-5)

def fasterai_terms(work, method):
    "Its callbacks, the teacher frozen by hand so that it has no graph"
    from fasterai.distill.all import Attention, KnowledgeDistillationCallback, SoftTarget
    teacher = deepcopy(work.teacher).requires_grad_(False)
    soft = KnowledgeDistillationCallback(teacher, partial(SoftTarget, T=4), weight=.9)
    attention = KnowledgeDistillationCallback(teacher, Attention, [f'model.{g}' for g in work.groups], [*work.groups], weight=.5)
    return [soft]*('KD' in method) + [attention]*('AT' in method)

class Torchdistill:
    "Its training box"
    def __init__(self, work, method):
        from torchdistill.core.distillation import DistillationBox
        path = lambda n: dict(io='output', path=n)
        pairs = {g: dict(teacher=path(g), student=path(g), weight=1) for g in work.groups}
        ends = dict(student_module_path='fc', student_module_io='output', teacher_module_path='fc', teacher_module_io='output')
        terms = {}
        if 'KD' in method: terms['kd'] = dict(criterion=dict(key='KDLoss', kwargs=dict(**ends, temperature=4, alpha=.1)), weight=1)
        else: terms['ce'] = dict(criterion=dict(key='CrossEntropyLoss', kwargs={}), criterion_wrapper=dict(key='SimpleLossWrapper', kwargs=dict(input=dict(is_from_teacher=False, module_path='fc', io='output'),
            target=dict(uses_label=True))), weight=1)
        if 'AT' in method: terms['at'] = dict(criterion=dict(key='ATLoss', kwargs=dict(at_pairs=pairs)), weight=1000)
        hooks = dict(forward_hook=dict(input=[], output=['fc', *(work.groups if 'AT' in method else [])]))
        config = dict(num_epochs=1, teacher=dict(hooks, forward_proc='forward_batch_only', requires_grad=False), student=dict(hooks, forward_proc='forward_batch_only', requires_grad=True), optimizer=dict(key='SGD', kwargs=dict(lr=1e-5, momentum=.9)),
            criterion=dict(key='WeightedSumLoss', kwargs=dict(sub_terms=terms)))
        self.batch,self.box = work.batch,DistillationBox(deepcopy(work.teacher), deepcopy(work.student), {}, config, work.device, None, False, 1)

    def __call__(self, n):
        self.box.pre_epoch_process(epoch=0)
        for _ in range(n): self.box.post_forward_process(self.box.forward_process(self.batch[0], targets=self.batch[1], supp_dict=None))

# Equal work, or nothing

class Keep(Callback):
    "The gradients of the first step"
    def before_step(self):
        self.grads = torch.cat([p.grad.flatten() for p in self.learn.student.parameters()])
        raise CancelFitException

def gradient_error(work, method):
    "Relative difference of kdfast's gradients from the loop's, both in float32"
    keep = Keep()
    ours = Fastai(work, work.teacher, [*(t() for t in methods[method]), keep], precision='float32')
    ours(1)
    hand = Loop(work, None, adapters_for(work, ours.learn))
    loop_loss(work, method, hand.student.train(), hand.adapters, *work.batch).backward()
    grads = torch.cat([p.grad.flatten() for p in hand.student.parameters()])
    return ((keep.grads-grads).norm()/grads.norm()).item()

def adapters_for(work, learn):
    made = adapters_of(learn.model)
    return [made[k] if (k := f'fitnet_{g}') in made else None for g in work.groups]

# How it is measured

def seconds(f, n, device):
    sync = torch.cuda.synchronize if device.type=='cuda' else noop
    sync()
    start = perf_counter()
    f(n)
    sync()
    return (perf_counter()-start)/n

def peak(f, device):
    "Bytes at the highest point of two steps, beyond those before"
    gc.collect()  # so that nothing of before is freed meanwhile
    if device.type=='cuda':
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        f(2)
        return torch.cuda.max_memory_allocated()-before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof: f(2)
    events = sorted((o for o in prof.profiler.kineto_results.events() if o.name()=='[memory]'), key=lambda o: o.start_ns())
    return max(itertools.accumulate(o.nbytes() for o in events))

def interleaved(ways, n, turns, device):
    "Seconds a step, a list of turns each"
    times = [{k:seconds(f, n, device) for k,f in ways.items()} for _ in range(turns)]
    return {k:[t[k] for t in times] for k in ways}

def ratio(times, a, b): return median(x/y for x,y in zip(times[a], times[b]))

def rows(part, work, times, of, memory={}, over=None):
    "One row a contestant"
    above = lambda k: median((x-p)/t for x,p,t in zip(times[k], times[over[0]], times[over[1]])) if over and k not in over else None
    return [dict(part=part, work=work, who=k, ms=1e3*median(v), ratio=ratio(times, k, of), of=of, above=above(k), mb=memory[k]/1e6 if k in memory else None) for k,v in times.items()]

# The parts

def channels_last(work):
    "The same work with networks and images in the order in memory that convolutions in half precision are fastest in"
    res,last = copy(work),dict(memory_format=torch.channels_last)
    res.teacher,res.student,res.batch = deepcopy(work.teacher).to(**last),deepcopy(work.student).to(**last),(work.batch[0].to(**last),work.batch[1])
    return res

def halved(work, loss):
    "`loss` in bfloat16 wherever autocast takes it"
    def half(*args):
        with torch.autocast(work.device.type, torch.bfloat16): return loss(*args)
    return half

def contestants(work, method):
    "Contestant to what makes it"
    kd = lambda **kwargs: partial(Fastai, work, work.teacher, [t() for t in methods[method]], **kwargs)
    def look():
        def f(n):
            with torch.no_grad(): return [work.teacher.eval()(work.batch[0]) for _ in range(n)] and None
        return f
    def by_hand(half=False):
        exact = kd(precision='float32')()
        exact.learn.teacher.setup()
        mine = channels_last(work) if half else work
        loss = partial(loop_loss, mine, method)
        return Loop(mine, halved(mine, loss) if half else loss, adapters_for(work, exact.learn))
    res = {'plain student': lambda: Loop(work, lambda s,a,x,y: F.cross_entropy(s(x), y)), 'teacher forward':look, 'loop by hand':by_hand, 'kdfast, float32':kd(precision='float32'), 'kdfast':kd()}
    if work.device.type=='cpu': res['kdfast, int8'] = kd(precision=int8_teacher)
    if native_bf16(work.device): res.update({'loop by hand in bf16':partial(by_hand, half=True), 'kdfast, student in bf16':kd(half=True), 'plain student in bf16':partial(Fastai, work, half=True)})
    if method=='KD+AT': res['kdfast, compiled'] = kd(compile=True)
    if method!='FitNet': res.update({'torchdistill':partial(Torchdistill, work, method), 'fasterai':lambda: Fastai(work, cbs=fasterai_terms(work, method))})
    return res

def step_ways(work, method):
    "Contestant to what runs it"
    return {k:make() for k,make in contestants(work, method).items()}

def step_part(steps, turns):
    for work,method in itertools.product(works(), methods):
        err = gradient_error(work, method)
        if not err<1e-5: sys.exit(f"{work.name}, {method}: kdfast's gradients differ from the loop's by {err:.1e}: there is nothing to compare")
        ways = step_ways(work, method)
        memory = {k:peak(f, work.device) for k,f in ways.items()}  # before any has taken a step, so that what it keeps counts
        yield from rows('step', f'{work.name}, {method}', interleaved(ways, steps, turns, work.device), 'loop by hand', memory, ('plain student','teacher forward'))

def fit_way(make, half=None):
    "A function that trains one epoch, in bfloat16 where that is native"
    learn = make()
    if native_bf16(default_device()) if half is None else half:
        learn.to_bf16()
        learn.model.to(memory_format=torch.channels_last)
    def fit(n):
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(n, 1e-3)
    fit(1)
    return fit

def epoch_part(cifar, imagenette, turns, pct=.1):
    "Whole epochs, validation included, from files and in memory, alone and distilled"
    data = {'CIFAR-10, a tenth, WRN-40-2 to WRN-16-1':(partial(cifar10_dls, cifar, pct=pct), wrn(40, 2), partial(wrn, 16, 1)),
        'Imagenette, a tenth, 64 px, ResNet-34 to ResNet-10':(partial(imagenette_dls, imagenette, size=64, pct=pct), resnet(34), partial(resnet, 10))}
    for name,(make,teacher,student) in data.items():
        dls = {o:make(in_memory=o=='in memory') for o in ('from files','in memory')}
        ways = {f'{k}, {who}': fit_way(partial(distill_learner, o, t, student, cbs=[KD(), at()] if t else None)) for k,o in dls.items() for who,t in (('alone',None), ('KD+AT',teacher))}
        yield from rows('epoch', name, interleaved(ways, 1, turns, dls['in memory'].device), 'from files, KD+AT')

class NoValidation(Callback):
    order = 100
    def before_validate(self): raise CancelValidException

def cache_part(cifar, turns, folder, pct=.1):
    "The training part of epochs on two views of each image"
    dls = cifar10_dls(cifar, pct=pct, in_memory=True)
    for half in (False,True)[:1+native_bf16(dls.device)]:
        teacher,student = wrn(40, 2),partial(wrn, 16, 1)
        arm = lambda t,*cbs: fit_way(partial(distill_learner, dls, t, student, cbs=[*cbs, NoValidation()]), half)
        ways = {'plain student':arm(None), **{f'{name}, cached':arm(teacher, *(t() for t in methods[name]), TeacherCache(folder/f'{name} {half}', views=2)) for name in ('KD','KD+AT')}, 'KD+AT':arm(teacher, KD(), AT())}
        yield from rows('cached epoch', f"CIFAR-10, WRN-40-2 to WRN-16-1, student in {'bf16' if half else 'float32'}", interleaved(ways, 1, turns, dls.device), 'plain student')

def imports(turns):
    "Seconds that an import takes in a process of its own"
    lines = {'fastai.vision.all':'from fastai.vision.all import *', 'and kdfast.all':'from fastai.vision.all import *; from kdfast.all import *'}
    run = lambda line: float(subprocess.run([sys.executable, '-W', 'ignore', '-c', f'import time; s=time.perf_counter(); {line}; print(time.perf_counter()-s)'], capture_output=True, text=True, check=True).stdout)
    return {k:[run(o) for _ in range(turns)] for k,o in lines.items()}

def start_part(turns):
    yield from rows('start', 'import', imports(turns), 'fastai.vision.all')
    work,device = works()[0],default_device()
    def first_batch(**kwargs): return lambda n: Fastai(work, **kwargs)(1)
    ways = {'plain learner':first_batch(), 'kdfast, KD+AT':lambda n: Fastai(work, work.teacher, [KD(), at()])(1)}
    yield from rows('start', 'learner made and first batch trained', interleaved(ways, 1, turns, device), 'plain learner')

def growth_part(steps, turns):
    device = default_device()
    def ours(work, *terms): return Fastai(work, work.teacher, [*terms])
    def look(work):
        def f(n):
            with torch.no_grad(): return [work.teacher.eval()(work.batch[0]) for _ in range(n)] and None
        return f
    groups = ['group1','group2','group3']
    deep = Work('', wrn(40, 2), wrn(40, 1), 32, 64, groups)
    taps = {'teacher forward':look(deep), **{f'AT, {3*n} taps':ours(deep, at(per_stage=n)) for n in (1,2,3,6)}}
    yield from rows('growth', 'taps, WRN-40-2 to WRN-40-1', interleaved(taps, steps, turns, device), 'teacher forward')
    small = Work('', wrn(40, 2), wrn(16, 1), 32, 64, groups)
    terms = {'1 term':ours(small, KD()), **{f'{n} terms':ours(small, KD(), *(at() for _ in range(n-1))) for n in (2,4,8)}}
    yield from rows('growth', 'terms, WRN-40-2 to WRN-16-1', interleaved(terms, steps, turns, device), '1 term')
    for what,sizes in {'batch':[(32,32),(32,64),(32,128),(32,256)], 'image':[(32,32),(64,32),(96,32)]}.items():
        for size,bs in sizes:
            work = Work('', wrn(40, 2), wrn(16, 1), size, bs, groups)
            ways = {'loop by hand':Loop(work, partial(loop_loss, work, 'KD+AT')), 'kdfast':ours(work, KD(), at())}
            yield from rows('growth', f'{what} size: {bs} images of {size} px', interleaved(ways, max(1, steps//2), turns, device), 'loop by hand')

def share_part(steps, turns):
    "A step in which the gradients of labels and terms are measured, by those in which weights are fixed"
    def measured(work, *terms):
        f = Fastai(work, work.teacher, [*terms])
        f.learn.teacher.every = 1
        return f
    for work in works():
        fixed,balanced = {'AT':(at(),), 'AT+FitNet':(at(),hints())},{'AT':(AT(),), 'AT+FitNet':(AT(),FitNet())}
        for k in fixed:
            ways = {'fixed weights':Fastai(work, work.teacher, [*fixed[k]]), 'every step measured':measured(work, *balanced[k])}
            yield from rows('share', f'{work.name}, {k}', interleaved(ways, steps, turns, work.device), 'fixed weights')

def floor_part(turns):
    "What a teacher's forward consists of in its own precision, and what its multiplications alone would take at the rate of a large matrix product"
    for work in works():
        frozen = Frozen(work.teacher, (work.batch[0][:2],), work.groups)
        a = torch.randn(2048, 2048, device=work.device, dtype=frozen.dtype or torch.float32)
        def exact(n):
            with torch.no_grad(): return [work.teacher.eval()(work.batch[0]) for _ in range(n)] and None
        ways = {'teacher forward, float32':exact, 'frozen':lambda n: [frozen(work.batch[0]) for _ in range(n)] and None, 'matrix product':lambda n: [a@a for _ in range(n)] and None}
        times = interleaved(ways, 3, turns, work.device)
        with profile(activities=[ProfilerActivity.CPU]+[ProfilerActivity.CUDA]*(work.device.type=='cuda')) as prof: ways['frozen'](3)
        events = prof.key_averages()
        share = sum(o.self_cpu_time_total for o in events if 'convolution' in o.key)/sum(o.self_cpu_time_total for o in events)
        product,macs = times.pop('matrix product'),count_macs(work.teacher, work.batch[0].shape[-1])*len(work.batch[0])
        times['its convolutions'] = [share*t for t in times['frozen']]
        times['its multiplications as one matrix product'] = [t*macs/2048**3 for t in product]
        yield from rows('floor', work.name, times, 'teacher forward, float32')

# The table

def markdown(rows):
    cell = lambda v: '' if v is None else f'{v:.2f}'
    line = lambda o: f"| {o['part']} | {o['work']} | {o['who']} | {o['ms']:,.1f} | {o['ratio']:.2f} | {o['of']} | {cell(o['above'])} | {'' if o['mb'] is None else round(o['mb'])} |"
    return '\n'.join(['| part | work | who | ms | times | of | teacher forwards above plain | peak MB |', '|---|---|---|---|---|---|---|---|', *map(line, rows)])

def main(argv=None):
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--cifar')
    parser.add_argument('--imagenette')
    parser.add_argument('--steps', type=int, default=8, help="Steps a turn")
    parser.add_argument('--turns', type=int, default=5)
    parser.add_argument('--parts', default='step,epoch,cache,start,growth,floor', help="Also share, which `make bench` runs by itself")
    parser.add_argument('--out', type=Path, help="A folder for bench.md and bench.json, in which the rows of these parts are replaced; printed where there is none")
    args,device = parser.parse_args(argv),default_device()
    with tempfile.TemporaryDirectory() as folder:
        parts = dict(step=lambda: step_part(args.steps, args.turns), epoch=lambda: epoch_part(args.cifar, args.imagenette, min(3, args.turns)), cache=lambda: cache_part(args.cifar, args.turns, Path(folder)),
            start=lambda: start_part(args.turns), growth=lambda: growth_part(args.steps, args.turns),
            share=lambda: share_part(args.steps, args.turns), floor=lambda: floor_part(args.turns))
        found = []
        for k in args.parts.split(','):
            set_seed(0)
            found += parts[k]()
    where = torch.cuda.get_device_name() if device.type=='cuda' else f'{torch.get_num_threads()} threads, bfloat16 {"native" if native_bf16(device) else "not native"}'
    told = f"`make bench`: {where}, torch {version('torch')}, fasterai {version('fasterai')}, torchdistill {version('torchdistill')}"
    if args.out is None: return print(f'{told}\n\n{markdown(found)}')
    file,new = args.out/'bench.json',{o['part'] for o in found}
    if file.exists(): found = [o for o in json.loads(file.read_text())['rows'] if o['part'] not in new] + found
    file.write_text(json.dumps(dict(where=told, rows=found), indent=0))
    (args.out/'bench.md').write_text(f'{told}\n\n{markdown(found)}\n')

if __name__=='__main__': main()
