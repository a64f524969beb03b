"""What training block by block costs a batch: kdfast, a loop that runs both whole networks in every stage, and joint FitNet training

    python benchmarks/block_cost.py

A ResNet-34 gives hints to a ResNet-10 and to the residual CNN, 128 px, float32, Adam. The loop (a) does what the reference implementation of arXiv:1911.06786 does: in every stage both
networks run to their end, hooks read the two maps, and the gradient goes to one block; its teacher runs under `no_grad`, and the blocks before are frozen in eval, as kdfast's are. It is shown
with images as they come, and with images in channels-last order, which kdfast's stages choose on a CPU. First the block gradients of kdfast and of (a) are compared, in float32 with the images in
one order, and in float64 with the images as they come, since in float32 another order rounds otherwise; where they differ by more than 1e-5, nothing is printed. (b) is `FitNet` at the same five
layers with one loss and one backward through the whole student. Turns are interleaved, medians shown; what is timed are training batches, from the end of one to the end of the next."""
import sys, warnings
from argparse import ArgumentParser
from importlib.metadata import version
from statistics import median
from time import perf_counter
warnings.filterwarnings('ignore')
from fastai.vision.all import *
from kdfast.all import *
from kdfast.layers.taps import get_layer

class Steps:
    "A loader that gives one batch `n` times"
    def __init__(self, batch, n): self.batch,self.n = batch,n
    def __len__(self): return self.n
    def __iter__(self): return (self.batch for _ in range(self.n))

def loaders(batch, n):
    dls = DataLoaders(Steps(batch, n), Steps(batch, 0))
    dls.c = 10
    return dls

class Ticks(Callback):
    "When training batches end"
    order = 1000
    def __init__(self): self.at = []
    def after_batch(self):
        if not self.training: return
        if self.x.is_cuda: torch.cuda.synchronize()
        self.at.append(perf_counter())

    @property
    def seconds(self): return np.diff(self.at).mean()

class Keep(Callback):
    "The gradients of the first step"
    def before_step(self):
        self.grads = {n:p.grad.clone() for n,p in self.learn.student.named_parameters() if p.grad is not None}
        raise CancelFitException("enough")

def fitted(student, teacher, batch, n, epochs, head=0, cbs=(), precision='auto', **kwargs):
    learn = distill_learner(loaders(batch, n), teacher, student, precision=precision, loss_func=CrossEntropyLossFlat())
    learn.remove_cb(KD)
    with learn.no_bar(), learn.no_logging(): learn.fit_blocks(epochs, head=head, cbs=cbs, validate=False, **kwargs)

class Whole:
    "Stage `i` by a loop in which both networks run to their end; the classifier's stage runs no teacher"
    def __init__(self, student, teacher, blocks, i, batch):
        self.student,self.teacher,self.block,self.batch = student.eval(),teacher.eval(),blocks[i],batch
        for n,p in student.named_parameters(): p.requires_grad_(n in self.block.params)
        for n,m in student.named_modules():
            if n in self.block.layers: m.training = True
        self.opt,self.kept = Adam([p for p in student.parameters() if p.requires_grad], lr=1e-3),{}

    def loss(self):
        x,y = self.batch
        if not self.block.tap: return F.cross_entropy(self.student(x), y)
        nets = {'s':(self.student, self.block.tap), 't':(self.teacher, self.block.hint)}
        handles = [get_layer(m, n).register_forward_hook(lambda m,i,o,k=k: self.kept.__setitem__(k, o)) for k,(m,n) in nets.items()]
        self.student(x)
        with torch.no_grad(): self.teacher(x)
        for h in handles: h.remove()
        return F.mse_loss(self.kept['s'], self.kept['t'])

    def grads(self):
        self.loss().backward()
        return {n:p.grad.clone() for n,p in self.student.named_parameters() if p.grad is not None}

    def seconds(self, n):
        at = []
        for _ in range(n):
            self.loss().backward()
            self.opt.step()
            self.opt.zero_grad()
            if self.batch[0].is_cuda: torch.cuda.synchronize()
            at.append(perf_counter())
        return np.diff(at).mean()

def one(i, n): return [int(j==i) for j in range(n)]

def gradient_error(student, teacher, blocks, batch):
    "The largest relative difference of a block's gradients, kdfast's from the loop's"
    def error(i):
        keep,n = Keep(),len(blocks)-1
        fitted(deepcopy(student), teacher, batch, 1, one(i, n), cbs=keep, precision='float32')
        hand = Whole(deepcopy(student), teacher, blocks, i, batch).grads()
        ours,theirs = (torch.cat([o[k].flatten() for k in sorted(hand)]) for o in (keep.grads,hand))
        return ((ours-theirs).norm()/theirs.norm()).item() if keep.grads.keys()==hand.keys() else math.inf
    return max(error(i) for i in range(len(blocks)-1))

def ways(student, teacher, blocks, batch):
    "Way to a function that takes a number of batches and gives seconds a batch"
    names,n,copy = [b.tap or 'classifier' for b in blocks],len(blocks)-1,lambda: deepcopy(student)
    def ours(steps, *args, **kwargs):
        ticks = Ticks()
        fitted(copy(), teacher, batch, steps, *args, cbs=ticks, **kwargs)
        return ticks.seconds
    def joint(steps):
        ticks = Ticks()
        learn = distill_learner(loaders(batch, steps), teacher, copy(), cbs=[FitNet(stem=True, weight=100.), ticks], loss_func=CrossEntropyLossFlat())
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
        return ticks.seconds
    staged = {('kdfast',o): partial(lambda steps,i: ours(steps, one(i, n), int(i==n)), i=i) for i,o in enumerate(names)}
    last = batch[0].contiguous(memory_format=torch.channels_last),batch[1]
    whole = {(k,o): Whole(copy(), teacher, blocks, i, b).seconds for i,o in enumerate(names) for k,b in {'a':batch, 'a, last':last}.items()}
    return {**staged, **whole, ('parallel','')  : lambda steps: ours(steps, 1, mode='parallel'), ('joint',''): joint}

def measure(fs, steps, turns):
    for f in fs.values(): f(2)
    return [{k:f(steps) for k,f in fs.items()} for _ in range(turns)]

def table(times, names):
    "Markdown: ms of each stage and of all, and the ratio of kdfast's to the loop's"
    n = len(names)
    def each(way): return {o: lambda t,o=o: t[way,o] for o in names} | {f'all {n} stages, one batch each': lambda t: sum(t[way,o] for o in names)}
    ours,loops = each('kdfast'),[each('a'),each('a, last')]
    ms = lambda f: f'{1e3*median(map(f, times)):.0f}'
    ratio = lambda f,g: f'{median(f(t)/g(t) for t in times):.2f}'
    rows = [(o, ms(f), *(c for a in loops for c in (ms(a[o]), ratio(f, a[o])))) for o,f in ours.items()]
    others = {'all blocks in parallel, one batch': lambda t: t['parallel',''], f'joint FitNet (b), {n} batches': lambda t: n*t['joint','']}
    rows += [(o, ms(f), *(c for a in loops for c in ('', ratio(f, [*a.values()][-1])))) for o,f in others.items()]
    head = 'stage','kdfast, ms','whole networks (a), ms','ratio','(a), channels last, ms','ratio'
    return '\n'.join(f"| {' | '.join(o)} |" for o in (head, ['---']*6, *rows))

def main(argv=None):
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--size', type=int, default=128)
    parser.add_argument('--bs', type=int, default=16)
    parser.add_argument('--steps', type=int, default=4, help="Batches a turn")
    parser.add_argument('--turns', type=int, default=7)
    args,device = parser.parse_args(argv),default_device()
    set_seed(0)
    batch = torch.randn(args.bs, 3, args.size, args.size, device=device),torch.randint(0, 10, (args.bs,), device=device)
    where = torch.cuda.get_device_name() if device.type=='cuda' else f'{torch.get_num_threads()} threads'
    print(f"{where}, torch {version('torch')}, {args.size} px, batches of {args.bs}")
    for name,student in {'ResNet-10':resnet(10), 'residual CNN':residual_cnn()}.items():
        student,teacher = student.to(device),resnet(34).to(device)
        learn = distill_learner(loaders(batch, 1), teacher, student, loss_func=CrossEntropyLossFlat())
        blocks = find_blocks(learn)
        last,exact = (batch[0].contiguous(memory_format=torch.channels_last), batch[1]),(batch[0][:2].double(), batch[1][:2])
        err = max(gradient_error(student, teacher, blocks, last), gradient_error(deepcopy(student).double(), deepcopy(teacher).double(), blocks, exact))
        if not err<1e-5: sys.exit(f"The gradients of kdfast and of the loop differ by {err:.1e}: there is nothing to compare")
        print(f"\n### ResNet-34 to {name}\n\nGradients of kdfast and of (a) differ by at most {err:.0e}.\n", flush=True)
        print(table(measure(ways(student, teacher, blocks, batch), args.steps, args.turns), [b.tap or 'classifier' for b in blocks]), flush=True)

if __name__=='__main__': main()
