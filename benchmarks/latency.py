"""Is the time that `fit_budget` finds before training that of the file which is deployed after it?

    python benchmarks/latency.py

Each network gets the largest width within a budget of milliseconds, measured in onnxruntime; that student is distilled from the committed teacher of the digits at 32 px, deployed, and its file timed in a process of its own, as on another machine. Beside it, what torch takes for the same student."""
import sys, tempfile, warnings
from argparse import ArgumentParser
from importlib.metadata import version
warnings.filterwarnings('ignore')
from fastai.vision.all import *
from kdfast.all import *

networks = {'WRN-16':lambda k: wrn(16, k), 'ResNet-10':lambda k: resnet(10, width=k/8, stem='small'), 'MobileNet':lambda k: mobile(width=k/2)}
widths = [2**(i/4) for i in range(-8, 13)]

def row(name, ms, dls, teacher, folder):
    set_seed(0)
    fit = fit_budget(networks[name], ms=ms, over=widths, size=32, runtime=Runtime())
    learn = distill_learner(dls, teacher, fit.model, metrics=accuracy, path=folder)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(5, 3e-3)
    deployed = learn.deploy('student.onnx')
    measured,by_torch = Runtime(on='sh -c', python=sys.executable).of_file(deployed.file),compare({'net':learn.student}, 32, reps=50)['ms per image'].item()
    return f'| {name} | {ms} | {count_params(learn.student):,} | {fit.count:.3f} | {measured:.3f} | {by_torch:.3f} | {100*deployed.deployed:.1f} |'

def main(argv=None):
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--ms', type=float, nargs='+', default=[.5,1.,2.])
    args = parser.parse_args(argv)
    options = f" --ms {' '.join(map(str, args.ms))}" if args.ms!=parser.get_default('ms') else ''
    dls,teacher = digits_dls(64),wrn(16, 2)
    teacher.load_state_dict(torch.load(Path(__file__).parent.parent/'results/teachers/digits-wrn-16-2-6d2ffa618672.pth')['weights'])
    print(f"`python benchmarks/latency.py{options}`, torch {version('torch')}, onnxruntime {version('onnxruntime')}, one thread; ms of one image: the budget, what `fit_budget` found before training, the deployed file in another process, and torch; accuracy of the file in %.\n")
    print('| network | budget | parameters | predicted | measured | torch | accuracy |\n|---|---|---|---|---|---|---|')
    with tempfile.TemporaryDirectory() as folder:
        for name in networks:
            for ms in args.ms: print(row(name, ms, dls, teacher, Path(folder)), flush=True)

if __name__=='__main__': main()
