"""What a student learns from a teacher in float32, in bfloat16 and in int8: the same seeds, the same batches

    python benchmarks/precision.py --data CIFAR --seeds 3

WRN-16-2 (results/teachers) teaches WRN-16-1 by KD and AT on a fifth of CIFAR-10, the student in bfloat16. Each line of results/precision.jsonl is one finished run, and is not run again; the table goes to
results/precision.md."""
import json, warnings
from argparse import ArgumentParser
warnings.filterwarnings('ignore')
from fastai.vision.all import *
from kdfast.all import *
from kdfast.experiments.arm import load_network

precisions = 'float32','bf16','int8'

def one(dls, teacher, precision, seed, epochs):
    "Accuracy after a run, and the seconds that it took"
    set_seed(seed)
    dls.train.rng.seed(seed)
    learn = distill_learner(dls, teacher, partial(wrn, 16, 1), cbs=[KD(), AT(weight=1e3)], precision=int8_teacher if precision=='int8' else precision, metrics=accuracy).to_bf16()
    learn.model.to(memory_format=torch.channels_last)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, 2e-2)
    return learn.recorder.history['accuracy'].iloc[-1].item()

def table(rows):
    "Markdown: the accuracies of each precision, and the differences from float32 seed by seed"
    of = {p:{r['seed']:100*r['accuracy'] for r in rows if r['precision']==p} for p in precisions}
    lines = ['| teacher | accuracies, % | mean | standard deviation | minus float32, seed by seed | mean |', '|---|---|---|---|---|---|']
    for p,accs in of.items():
        gaps = [accs[s]-of['float32'][s] for s in sorted(accs) if s in of['float32']]
        cells = ' '.join(f'{accs[s]:.2f}' for s in sorted(accs)),f'{np.mean([*accs.values()]):.2f}',f'{np.std([*accs.values()], ddof=1):.2f}',' '.join(f'{g:+.2f}' for g in gaps),f'{np.mean(gaps):+.2f}'
        lines.append(f"| {p} | {' | '.join(cells if p!='float32' else (*cells[:3],'',''))} |")
    return '\n'.join(lines)

def main(argv=None):
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--data', required=True)
    parser.add_argument('--out', type=Path, default=Path('results'))
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--epochs', type=int, default=10)
    args = parser.parse_args(argv)
    file = args.out/'precision.jsonl'
    dls = cifar10_dls(args.data, pct=.2, in_memory=True)
    teacher = wrn(16, 2)
    load_network(teacher, args.out/'teachers/cifar10-wrn-16-2.pth')
    rows = [json.loads(o) for o in file.read_text().splitlines()] if file.exists() else []
    for seed,precision in itertools.product(range(args.seeds), precisions):
        if any((r['seed'],r['precision'])==(seed,precision) for r in rows): continue
        rows.append(dict(precision=precision, seed=seed, epochs=args.epochs, accuracy=one(dls, teacher, precision, seed, args.epochs)))
        with file.open('a') as f: f.write(json.dumps(rows[-1])+'\n')
    text = f"`python benchmarks/precision.py --data CIFAR --seeds {args.seeds} --epochs {args.epochs}`, torch {torch.__version__}\n\n{table(rows)}\n"
    (args.out/'precision.md').write_text(text)
    print(text)

if __name__=='__main__': main()
