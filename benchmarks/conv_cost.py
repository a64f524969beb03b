"""What a cheap convolution costs in time: each kind against the same computation written by hand, and hashed convolutions against full ones

    python benchmarks/conv_cost.py

First outputs and gradients are compared; where they differ by more than 1e-4 of the largest, nothing is printed. Then forward and backward, float32, channels last on a CPU, turns interleaved, medians of ratios shown.
The first table: 64 channels at 16 px, batch 64. The second: the shapes of a WRN-28-4 and a WRN-28-10, batch 64, a tenth of the weights."""
import math, sys, warnings
from argparse import ArgumentParser
from importlib.metadata import version
from statistics import median
from time import perf_counter
warnings.filterwarnings('ignore')
from fastai.vision.all import *
from kdfast.all import *
from kdfast.models.convs import init_he

kinds = {'Dilated2x2':Dilated2x2, 'Grouped(groups=4)':partial(Grouped, groups=4), 'Separable':Separable, 'Separable(linear=True)':partial(Separable, linear=True), 'SeparableGrouped(group_size=4)':partial(SeparableGrouped, group_size=4),
    'Bottleneck(b=4)':Bottleneck, 'SeparableChannelwise':SeparableChannelwise, 'Shuffle(groups=4)':Shuffle, 'LowRank(ratio=.5)':partial(LowRank, ratio=.5), 'Hashed(ratio=.1)':partial(Hashed, ratio=.1),
    'SeparableHashed(ratio=.5)':partial(SeparableHashed, ratio=.5), 'ACDC(n_layers=4)':ACDC, 'TensorTrain(ratio=.5)':partial(TensorTrain, ratio=.5), 'Tucker(ratio=.5)':partial(Tucker, ratio=.5), 'CP(ratio=.5)':partial(CP, ratio=.5)}

def depthwise(x, w): return F.conv2d(x, w, padding=1, groups=len(w))
def pointwise(x, w): return F.conv2d(x, w[...,None,None])
def norm_relu(x, m): return F.relu(F.batch_norm(x, m.running_mean.clone(), m.running_var.clone(), m.weight, m.bias, True))

def hashed(m, ks):
    n,budget = 64*64*ks*ks,len(m.weight)
    sign,place = 1-2*(m.index.long()//budget).float(),m.index.long()%budget
    def forward(x): return F.conv2d(x, (m.weight[place]*sign).view(64, 64, ks, ks), padding=ks//2)
    return forward

def cosines(n):
    "The matrix of the cosine transform"
    k = torch.arange(n, dtype=torch.float64)
    return (torch.cos(math.pi/n*(k[None]+.5)*k[:,None])*math.sqrt(2/n)*torch.where(k==0, .5**.5, 1.)[:,None]).float()

def acdc(m):
    C,riffle = cosines(64),torch.tensor([i//2 + i%2*32 for i in range(64)])
    def matrix():
        w = torch.eye(64)
        for i,(a,d) in enumerate(zip(m.a, m.d)): w = C.t()@(d[:,None]*(C@(a[:,None]*(w[riffle] if i else w))))
        return w
    return matrix

def train(m):
    (a,b,c),(d,e,f),(l,mid,r) = m.outs,m.ins,m.cores
    def matrix(): return torch.einsum('adr,rbes,scf->abcdef', l.view(a,d,-1), mid.view(len(mid),b,e,-1), r.view(-1,c,f)).reshape(64, 64)
    return matrix

def tucker(m):
    a,b,c,d = m.factors
    sizes = [o.shape[1] for o in m.factors]
    def matrix(): return torch.einsum('ai,bj,ijkl,ck,dl->abcd', a, b, m.core.view(sizes), c, d).reshape(64, 64)
    return matrix

def cp(m):
    def matrix(): return torch.einsum('ar,br,cr,dr->abcd', *m.factors).reshape(64, 64)
    return matrix

def by_hand(name, m):
    "What `m` computes, in plain torch, on the same parameters"
    kind = name.split('(')[0]
    if kind=='Dilated2x2': return lambda x: F.conv2d(x, m.weight, padding=1, dilation=2)
    if kind=='Grouped': return lambda x: F.conv2d(x, m.weight, padding=1, groups=4)
    if kind=='Hashed': return hashed(m, 3)
    if kind=='Bottleneck': return lambda x: F.conv2d(norm_relu(F.conv2d(norm_relu(F.conv2d(x, m[0].weight), m[1]), m[3].weight, padding=1), m[4]), m[6].weight)
    if kind=='Shuffle': return lambda x: F.conv2d(depthwise(F.conv2d(x, m[0].weight, groups=4).unflatten(1, (4,16)).transpose(1, 2).flatten(1, 2), m[2].weight), m[3].weight, groups=4)
    if kind=='LowRank': return lambda x: F.conv2d(F.conv2d(depthwise(x, m[0].weight), m[1].weight), m[2].weight)
    if kind=='SeparableGrouped': return lambda x: F.conv2d(norm_relu(F.conv2d(x, m[0].weight, padding=1, groups=16), m[1]), m[3].weight)
    if name=='Separable': return lambda x: F.conv2d(norm_relu(depthwise(x, m[0].weight), m[1]), m[3].weight)
    if kind=='Separable': return lambda x: F.conv2d(depthwise(x, m[0].weight), m[1].weight)
    if kind=='SeparableHashed':
        last = hashed(m[1], 1)
        return lambda x: last(depthwise(x, m[0].weight))
    if kind=='SeparableChannelwise':
        shifts = [torch.eye(64).roll(i, 1).triu(0) if i>0 else torch.eye(64).roll(i, 1).tril(0) if i<0 else torch.eye(64) for i in (-1,0,1)]
        return lambda x: pointwise(norm_relu(depthwise(x, m[0].weight), m[1]), sum(w*s for w,s in zip(m[3].weight, shifts)))
    matrix = {'ACDC':acdc, 'TensorTrain':train, 'Tucker':tucker, 'CP':cp}[kind](m[1])
    return lambda x: pointwise(depthwise(x, m[0].weight), matrix())

def gradients(f, params, x):
    out = f(x)
    return [out, *torch.autograd.grad((out*torch.linspace(-1, 1, out.numel()).view_as(out)).sum(), [x,*params])]

def largest_error(name, conv):
    torch.manual_seed(0)
    m,x = init_he(conv(64, 64)),torch.randn(4,64,16,16,requires_grad=True)
    ours,theirs = (gradients(f, [*m.parameters()], x) for f in (m,by_hand(name, m)))
    return max(((a-b).abs().max()/(1e-3+b.abs().max())).item() for a,b in zip(ours, theirs))

def seconds(f, params, x):
    for p in params: p.grad = None
    start = perf_counter()
    f(x).square().mean().backward()
    return perf_counter()-start

def ratio(ours, theirs, turns):
    "Median over the turns of the time of `ours` by that of `theirs`, each a function, its parameters and its input"
    seconds(*ours),seconds(*theirs)
    pairs = [(seconds(*ours),seconds(*theirs)) for _ in range(turns)]
    return median(a/b for a,b in pairs),*(1e3*median(o) for o in zip(*pairs))

def batch(channels, px, bs=64): return torch.randn(bs,channels,px,px).contiguous(memory_format=torch.channels_last).requires_grad_()

def measure(turns, names=kinds):
    rows = {}
    for name in names:
        m,x = init_he(kinds[name](64, 64)),batch(64, 16)
        rows[name] = ratio((m,[*m.parameters()],x), (by_hand(name, m),[*m.parameters()],x), turns)
    return rows

def measure_hashed(turns, shapes=((64,32),(256,8),(640,8))):
    rows = {}
    for channels,px in shapes:
        x,(h,f) = batch(channels, px),(init_he(c(channels, channels)) for c in (partial(Hashed, ratio=.1),Full))
        rows[f'{channels} channels, {px} px'] = ratio((h,[*h.parameters()],x), (f,[*f.parameters()],x), turns)
    return rows

def table(first, other, rows):
    lines = [f'| {k} | {a:.1f} | {b:.1f} | {r:.2f} |' for k,(r,a,b) in rows.items()]
    return '\n'.join([f'| {first} | ms | {other}, ms | ratio |', '|---|---|---|---|', *lines])

def main(argv=None):
    p = ArgumentParser()
    p.add_argument('--turns', type=int, default=15)
    args = p.parse_args(argv)
    errors = {k:largest_error(k, c) for k,c in kinds.items()}
    if max(errors.values())>1e-4: sys.exit(f"Outputs or gradients differ: {({k:v for k,v in errors.items() if v>1e-4})}")
    print(f"`python benchmarks/conv_cost.py --turns {args.turns}`, torch {version('torch')}, {torch.get_num_threads()} threads; outputs and gradients agree to {max(errors.values()):.0e}.\n")
    print(table('kind', 'by hand', measure(args.turns)), '\n')
    print(table('hashed to a tenth', 'full', measure_hashed(args.turns)))

if __name__=='__main__': main()
