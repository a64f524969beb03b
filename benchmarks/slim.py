"""Is one slimmable student as good as separate students of its widths, in the same time?

    python benchmarks/slim.py --cifar ../shared/data/cifar10.tar.xz

Students of four widths, each distilled by itself; then one slimmable student with as many epochs as each of them had; then one with the seconds that all of them took. All are parts of the same network, distilled by `KD` at the same learning rate, from committed teachers."""
import warnings
from argparse import ArgumentParser
from importlib.metadata import version
from statistics import mean, stdev
from time import process_time
warnings.filterwarnings('ignore')
from fastai.vision.all import *
from kdfast.all import *
from kdfast.compress.slim import first_channels
from kdfast.learner import accuracy_of
from kdfast.models.convs import init_he

widths,teachers = (.25,.5,.75,1.),Path(__file__).parent.parent/'results/teachers'

def digits(): return 'digits, WRN-10-2 to WRN-10-1',digits_dls(64, size=16),wrn(10, 2),'digits-wrn-10-2-1f799070ccb7.pth',partial(wrn, 10, 1),6,3

def cifar(path): return '10,000 images of CIFAR-10, WRN-16-2 to WRN-16-1',cifar10_dls(path, 64, .2, in_memory=True),wrn(16, 2),'cifar10-wrn-16-2.pth',partial(wrn, 16, 1),8,1

def part_of(student, width, size): return init_he(prune_channels(student, size, 1-width, importance=first_channels)[0]) if width<1 else student

def fit(dls, teacher, student, epochs, seed, *cbs):
    "The learner, and its seconds of processor time"
    dls.train.rng.seed(seed)
    learn,began = distill_learner(dls, teacher, student, cbs=[KD(), *cbs]),process_time()
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, 1e-2)
    return learn,process_time()-began

def arms(dls, teacher, make, size, epochs, seed):
    "Epochs, accuracies at all widths and seconds of each arm"
    set_seed(seed)
    apart = [fit(dls, teacher, part_of(make(), w, size), epochs, seed) for w in widths]
    seconds = sum(s for _,s in apart)
    yield 'one by one',epochs,[accuracy_of(l.student, dls) for l,_ in apart],seconds
    took = None
    for name in ('slimmable','slimmable, same time'):
        n = round(epochs*seconds/took) if took else epochs
        set_seed(seed)
        learn,took = fit(dls, teacher, make(), n, seed, Slimmable())
        yield name,n,[accuracy_of(learn.narrow(w), dls) for w in widths],took

def told(values): return f'{mean(values):.1f}' + (f' ± {stdev(values):.1f}' if len(values)>1 else '')

def table(title, dls, teacher, file, make, epochs, seeds):
    teacher.load_state_dict(torch.load(teachers/file)['weights'])
    size = dls.one_batch()[0].shape[-1]
    runs = [[*arms(dls, teacher, make, size, epochs, seed)] for seed in range(seeds)]
    print(f"\n{title}, {seeds} seed{'s'*(seeds>1)}\n\n| | epochs | {' | '.join(map(str, widths))} | seconds |\n|---|---|{'---|'*len(widths)}---|")
    print('| parameters | | ' + ' | '.join(f'{count_params(part_of(make(), w, size)):,}' for w in widths) + ' | |')
    for arm in zip(*runs):
        names,ns,accs,seconds = zip(*arm)
        print(f"| {names[0]} | {mean(ns):.0f} | " + ' | '.join(told([100*o for o in os]) for os in zip(*accs)) + f' | {mean(seconds):.0f} |', flush=True)

def main(argv=None):
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--cifar', help='Archive or folder of CIFAR-10')
    parser.add_argument('--epochs', type=int, help='Of each student, in place of 6 on the digits and 8 on CIFAR-10')
    args = parser.parse_args(argv)
    options = f' --cifar {args.cifar}'*bool(args.cifar) + f' --epochs {args.epochs}'*bool(args.epochs)
    print(f"`python benchmarks/slim.py{options}`, torch {version('torch')}, {torch.get_num_threads()} thread(s); accuracy in % at each width, mean and standard deviation over seeds; seconds of processor time.")
    for setting in (digits(), *([cifar(args.cifar)] if args.cifar else [])):
        *known,epochs,seeds = setting
        table(*known, args.epochs or epochs, seeds)

if __name__=='__main__': main()
