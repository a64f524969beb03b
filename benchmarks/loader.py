"""What the in-memory path saves: images per second of the loader alone, and an epoch against its bare steps

    python benchmarks/loader.py --cifar PATH --imagenette PATH

prints a markdown table. Both loaders run in one process, in turns; medians are shown."""
from argparse import ArgumentParser
from statistics import median
from time import perf_counter
from fastai.vision.all import *
from kdfast.all import *

def seconds(f):
    start = perf_counter()
    f()
    return perf_counter()-start

def rate(dl, n):
    "Images per second over `n` images"
    start,seen = perf_counter(),0
    for x,_ in dl:
        seen += len(x)
        if seen>=n: break
    return seen/(perf_counter()-start)

def loaders(name, make, turns=5, n=8000):
    files,memory = make(in_memory=False).train,make(in_memory=True).train
    for dl in (files,memory): rate(dl, 2*dl.bs)
    a,b = zip(*((rate(files, n),rate(memory, n)) for _ in range(turns)))
    return name,f'{median(a):,.0f}',f'{median(b):,.0f}',f'{median(y/x for x,y in zip(a, b)):.1f}'

class Bare:
    "A loader that gives one batch again and again"
    def __init__(self, batch, n): self.batch,self.n = batch,n
    def __len__(self): return self.n
    def __iter__(self): return (tuple(o.clone() for o in self.batch) for _ in range(self.n))

def epoch(dls, turns=5, batches=40):
    "The training part of an epoch of WRN-16-1 in bfloat16, over the same number of steps on a batch that lies ready"
    learn = distill_learner(dls, None, wrn(16, 1)).to_bf16()
    bare = Bare(dls.one_batch(), batches)
    class Only(Callback):
        "End the training part after `batches`"
        def after_batch(self):
            if self.training and self.iter+1>=batches: raise CancelTrainException
    def fit(dl):
        valid,dls.loaders[0] = dls.loaders[1],dl
        dls.loaders[1] = Bare(bare.batch, 1)
        try:
            with learn.no_bar(), learn.no_logging(): return seconds(lambda: learn.fit(1, 1e-3, cbs=Only()))
        finally: dls.loaders[1] = valid
    train = dls.train
    fit(bare)
    times = [(fit(train),fit(bare)) for _ in range(turns)]
    return median(a/b for a,b in times)

if __name__=='__main__':
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--cifar')
    parser.add_argument('--imagenette')
    args = parser.parse_args()
    print(f'{torch.get_num_threads()} threads, {defaults.cpus} worker processes for files\n')
    print('| data | files, images/s | in memory, images/s | ratio |\n|---|---|---|---|')
    if args.cifar: print('|', ' | '.join(loaders('CIFAR-10, 32 px', partial(cifar10_dls, args.cifar))), '|')
    if args.imagenette:
        for size in (64,72): print('|', ' | '.join(loaders(f'Imagenette, {size} px', partial(imagenette_dls, args.imagenette, size=size))), '|')
    if args.cifar: print(f'\nWRN-16-1 on CIFAR-10 in bfloat16: an epoch takes {epoch(cifar10_dls(args.cifar, in_memory=True)):.3f} times its bare steps')
