"""What a distillation step costs: kdfast, a loop written by hand, and fasterai, on the same work in one process

    python benchmarks/step_cost.py

WRN-40-2 teaches WRN-16-1 by KD and AT, batch 64, 32 px, float32, SGD. First kdfast's gradients are compared with those of the loop, which returns features from its
forward, has no hooks, and computes the same losses; where they differ by more than 1e-5, nothing is printed. Turns are interleaved, medians shown; memory is the
peak of what torch allocates in the first two steps, gradients and momentum included. fasterai takes one callback a term and runs the teacher in each, with a graph for its
backward unless the user has frozen it, so it is shown both ways; it has the formulas of its own library, weights .9 and .5."""
import itertools, os, sys, warnings
from argparse import ArgumentParser
from importlib.metadata import version
from statistics import median
from time import perf_counter
warnings.filterwarnings('ignore')
os.environ.setdefault('KINETO_LOG_LEVEL', '5')  # the profiler's own messages
from fastai.vision.all import *
from fasterai.distill.all import Attention, KnowledgeDistillationCallback, SoftTarget
from torch.profiler import ProfilerActivity, profile
from kdfast.all import *

groups = 'group1','group2','group3'

class Steps:
    "A loader that gives one batch `n` times"
    def __init__(self, batch, n): self.batch,self.n = batch,n
    def __len__(self): return self.n
    def __iter__(self): return (self.batch for _ in range(self.n))

def features(net, x):
    "Logits and the outputs of the groups, without a hook"
    x,feats = net.stem(x),[]
    for g in groups: feats.append(x := getattr(net, g)(x))
    return net.fc(net.flat(net.pool(net.act(net.bn(x))))),feats

def loop_loss(student, teacher, x, y):
    out,feats = features(student, x)
    with torch.no_grad(): t_out,t_feats = features(teacher, x)
    return .1*F.cross_entropy(out, y) + .9*kd_loss(out, t_out) + sum(1000*at_loss(s, t) for s,t in zip(feats, t_feats))

def sgd(params): return SGD(params, lr=1e-3, mom=.9)

class Loop:
    "Training written by hand"
    def __init__(self, student, loss, batch):
        self.student,self.loss,self.batch,self.opt = student,loss,batch,sgd([*student.parameters()])

    def __call__(self, n):
        self.student.train()
        for _ in range(n):
            self.loss(self.student, *self.batch).backward()
            self.opt.step()
            self.opt.zero_grad()

class Fastai:
    "Training by a learner"
    def __init__(self, student, teacher, batch, cbs=()):
        self.dls = DataLoaders(Steps(batch, 1), Steps(batch, 0))
        self.dls.c = 10
        self.batch,self.learn = batch,distill_learner(self.dls, teacher, student, cbs=cbs, precision='float32', opt_func=partial(SGD, mom=.9), loss_func=CrossEntropyLossFlat())

    def __call__(self, n):
        self.dls.loaders[0] = Steps(self.batch, n)
        with self.learn.no_bar(), self.learn.no_logging(): self.learn.fit(1, 1e-3)

def peers(teacher):
    "fasterai's two terms"
    soft = KnowledgeDistillationCallback(teacher, partial(SoftTarget, T=4), weight=.9)
    attention = KnowledgeDistillationCallback(teacher, Attention, [f'model.{g}' for g in groups], [*groups], weight=.5)
    return soft,attention

class Keep(Callback):
    "The gradients of the first step"
    def before_step(self):
        self.grads = torch.cat([p.grad.flatten() for p in self.learn.model.parameters()])
        raise CancelFitException

def gradient_error(student, teacher, batch):
    "Relative difference of kdfast's gradients from the loop's"
    keep,net = Keep(),deepcopy(student)
    Fastai(deepcopy(student), teacher, batch, [KD(), AT(), keep])(1)
    loop_loss(net.train(), teacher.eval(), *batch).backward()
    hand = torch.cat([p.grad.flatten() for p in net.parameters()])
    return ((keep.grads-hand).norm()/hand.norm()).item()

def seconds(f, n, device):
    sync = torch.cuda.synchronize if device.type=='cuda' else noop
    sync()
    start = perf_counter()
    f(n)
    sync()
    return (perf_counter()-start)/n

def peak(f, device):
    "Most bytes that torch has allocated at once in two steps, beyond those before"
    if device.type=='cuda':
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        f(2)
        return torch.cuda.max_memory_allocated()-before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof: f(2)
    events = sorted((o for o in prof.profiler.kineto_results.events() if o.name()=='[memory]'), key=lambda o: o.start_ns())
    return max(itertools.accumulate(o.nbytes() for o in events))

def measure(teacher, student, batch, steps, turns):
    "Seconds a step, one list of turns each, and peak memory"
    net,device = lambda: deepcopy(student),batch[0].device
    def look(n):
        with torch.no_grad(): return [teacher.eval()(batch[0]) for _ in range(n)] and None
    ways = {'plain student': Loop(net(), lambda s,x,y: F.cross_entropy(s(x), y), batch), 'teacher forward': look,
        'loop by hand': Loop(net(), lambda s,x,y: loop_loss(s, teacher, x, y), batch), 'kdfast': Fastai(net(), teacher, batch, [KD(), AT()]),
        'fastai, no teacher': Fastai(net(), None, batch), 'fasterai, two terms': Fastai(net(), None, batch, peers(deepcopy(teacher))),
        'fasterai, teacher frozen by hand': Fastai(net(), None, batch, peers(deepcopy(teacher).requires_grad_(False)))}
    memory = {k:peak(f, device) for k,f in ways.items()}  # before any has taken a step, so that what it keeps counts
    times = [{k:seconds(f, steps, device) for k,f in ways.items()} for _ in range(turns)]
    return {k:[t[k] for t in times] for k in ways},memory

def table(times, memory):
    "Markdown: ms, ratio to the loop, overhead in teacher forwards, peak memory"
    ratio = lambda k: median(a/b for a,b in zip(times[k], times['loop by hand']))
    over = lambda k: median((a-p)/t for a,p,t in zip(times[k], times['plain student'], times['teacher forward']))
    parts = 'plain student','teacher forward'
    rows = [(k, f'{1e3*median(v):.1f}', f'{ratio(k):.2f}', '' if k in parts else f'{over(k):.2f}', f'{memory[k]/1e6:.0f}') for k,v in times.items()]
    head = 'step of','ms','times the loop','teacher forwards above plain','peak memory, MB'
    return '\n'.join(f"| {' | '.join(o)} |" for o in (head, ['---']*5, *rows))

def main(argv=None):
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--steps', type=int, default=8, help="Steps a turn")
    parser.add_argument('--turns', type=int, default=9)
    args,device = parser.parse_args(argv),default_device()
    set_seed(0)
    teacher,student = wrn(40, 2).to(device),wrn(16, 1).to(device)
    batch = torch.randn(64, 3, 32, 32, device=device),torch.randint(0, 10, (64,), device=device)
    err = gradient_error(student, teacher, batch)
    if not err<1e-5: sys.exit(f"kdfast's gradients differ from the loop's by {err:.1e}: there is nothing to compare")
    where = torch.cuda.get_device_name() if device.type=='cuda' else f'{torch.get_num_threads()} threads'
    print(f"{where}, torch {version('torch')}, fasterai {version('fasterai')}; gradients of kdfast and of the loop differ by {err:.0e}\n")
    print(table(*measure(teacher, student, batch, args.steps, args.turns)))

if __name__=='__main__': main()
