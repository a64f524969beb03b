"""Distillation by several processes on one machine: images a second, against one process

    python benchmarks/scaling.py

WRN-40-2 teaches WRN-16-1 by KD, AT and FitNet on 64 images a process; each process has one thread and a teacher of its own, and gradients are averaged by gloo. Medians of interleaved runs, each in processes of its own."""
import os, socket, subprocess, sys, warnings
from argparse import ArgumentParser
from statistics import median
from time import perf_counter
warnings.filterwarnings('ignore')
from fastai.vision.all import *
from kdfast.all import *

class Clock(Callback):
    "When training batches end"
    order = 1000
    def __init__(self): self.at = []
    def after_batch(self):
        if self.training: self.at.append(perf_counter())

def worker(steps):
    "Images a second of all processes"
    n,clock = 64*steps,Clock()
    part = torch.randint(0, 255, (n*max(1, num_distrib()),3,32,32), dtype=torch.uint8),[str(i%10) for i in range(n*max(1, num_distrib()))]
    dls = tensor_dls(part, (part[0][:20],part[1][:20]), bs=64, device='cpu')
    learn = distill_learner(dls, wrn(40, 2), wrn(16, 1), cbs=[KD(), AT(weight=1e3), FitNet(weight=100.), clock])
    with all_processes(learn), learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    if not rank_distrib(): print(64*max(1, num_distrib())/np.median(np.diff(clock.at[2:])))

def rate(n, steps, threads=1):
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = str(s.getsockname()[1])
    env = lambda r: {**os.environ, 'OMP_NUM_THREADS':str(threads), **(dict(RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE=str(n), MASTER_ADDR='127.0.0.1', MASTER_PORT=port) if n>1 else {})}
    running = [subprocess.Popen([sys.executable, '-W', 'ignore', __file__, '--worker', '--steps', str(steps)], env=env(r), stdout=subprocess.PIPE, text=True) for r in range(n)]
    return float(running[0].communicate()[0].split()[-1]), [o.wait() for o in running[1:]]

def main(argv=None):
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--steps', type=int, default=20)
    parser.add_argument('--turns', type=int, default=3)
    parser.add_argument('--processes', type=int, nargs='*', default=[1,2])
    parser.add_argument('--worker', action='store_true', help="One of the processes, as this script starts them")
    args = parser.parse_args(argv)
    if args.worker: return worker(args.steps)
    ways = {**{f"{n} process{'es'*(n>1)} of one thread":(n,1) for n in args.processes}, f'1 process of {os.cpu_count()} threads':(1,os.cpu_count())}
    rates = [{k:rate(n, args.steps, threads)[0] for k,(n,threads) in ways.items()} for _ in range(args.turns)]
    one = next(iter(ways))
    print(f"`python benchmarks/scaling.py`, {os.cpu_count()} cores, torch {torch.__version__}\n\n| | images/s | times |\n|---|---|---|")
    for k in ways: print(f'| {k} | {median(r[k] for r in rates):,.0f} | {median(r[k]/r[one] for r in rates):.2f} |')

if __name__=='__main__': main()
