"""Train a cell of each committed table anew, and compare it with its record: `make rerun CELL=random`

    python tools/rerun.py random --minutes 20 --cifar cifar10.tar.xz --imagenette imagenette2-160.tgz
    python tools/rerun.py 'shares/10-1 from 16-2/fitnet'

A cell is a run of results/records.jsonl that a table in results/tables shows: its row, its arm and one of its seeds. It is trained on the teacher that is committed, or on one that is trained first where none is. Two
runs of a cell differ as two seeds do, on another processor even with the same seed, so it agrees if the difference is at most three times sqrt(2) standard deviations of a seed: the cell's own, or the
median of its table (of all tables of its data, where it has one seed a cell) if that is larger. What it finds is added to results/reruns.jsonl; a cell that fails, for want of its data for instance, does not
keep it from the others."""
import json, math, random, shutil, sys, tempfile
from argparse import ArgumentParser
from pathlib import Path
from statistics import median
from time import time
from kdfast.experiments.records import Records
from kdfast.experiments.research import research
from kdfast.experiments.run import origin_of
from kdfast.experiments.sweep import Sweep
from kdfast.experiments.tables import estimate

root = Path(__file__).absolute().parent.parent
schedule = 'cpu'

def tables(folder):
    "Those that are committed"
    return [o for o in research.values() if (folder/'tables'/f'{o.name}-{schedule}.md').exists()]

def seed_noise(table, row, arm, cells):
    "Standard deviation of a seed in points: that of the cell, or the table's median where this is larger; `cells` by table"
    def several(frames): return [o for f in frames for o in f.itertuples() if o.n>1]
    of_table = several([cells[table]]) or several(cells[o] for o in cells if o.data==table.data)
    return max([o.std for o in several([cells[table]]) if (o.row,o.arm)==(row,arm)] + [median(o.std for o in of_table)]) if of_table else None

def run_of_cell(table, known, row, arm, rng):
    "One of the runs on record behind a cell"
    runs = table.runs(schedule, [row], [arm], seeds=1+max(o.seed for o in known))
    return rng.choice([o for o in runs if (o.method=='control')==(arm=='alone') and o in known])

def again(table, run, known, folder, data):
    "Accuracy of `run` trained anew, in percent"
    with tempfile.TemporaryDirectory() as tmp:
        if (folder/'teachers').is_dir(): shutil.copytree(folder/'teachers', Path(tmp)/'teachers')
        sweep = Sweep(table.name, [run], tmp, data, controls=False)
        for o in sweep.runs:
            if o!=run and o in known and sweep.file_of(o).exists(): sweep.records.add(o, known[o])
        sweep.run()
        return 100*sweep.records.get(run)['accuracy']

def compared(table, row, arm, known, cells, args, data, rng):
    "A line for results/reruns.jsonl"
    run,noise = run_of_cell(table, known, row, arm, rng),seed_noise(table, row, arm, cells)
    told = dict(table=table.name, row=row, arm=arm, seed=run.seed, recorded=100*known[run]['accuracy'], noise=noise)
    minutes = float(estimate([run]).minutes[0])
    if minutes>args.minutes: return dict(told, state='not run', minutes=minutes)
    start = time()
    try: now = again(table, run, known, args.results, data)
    except (OSError,RuntimeError,ValueError) as e: return dict(told, state='failed', why=str(e).splitlines()[0])
    state = 'no seeds' if noise is None else 'agrees' if abs(now-told['recorded'])<=3*math.sqrt(2)*noise else 'differs'
    return dict(told, state=state, now=now, minutes=(time()-start)/60, **origin_of())

def chosen(cell, cells, rng):
    "Table, row and arm of each cell to do; raises `ValueError` for one that is not committed"
    frames = {o:[(r.row,r.arm) for r in f.itertuples()] for o,f in cells.items()}
    if cell=='random': return [(o,*rng.choice(f)) for o,f in frames.items()]
    name,row,arm = (cell.split('/')+['',''])[:3]
    found = [(o,*k) for o,f in frames.items() for k in f if o.name==name and k==(row,arm)]
    if not found: raise ValueError(f"No cell {cell!r} is committed: write TABLE/ROW/ARM, such as '{first_of(frames)}', or random")
    return found

def first_of(frames): return next('/'.join((o.name,*f[0])) for o,f in frames.items())

def main(argv=None):
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('cell', help="random, or TABLE/ROW/ARM")
    parser.add_argument('--minutes', type=float, default=20., help="Cells that are likely to take longer are only named")
    for o in ('cifar','imagenette'): parser.add_argument(f'--{o}', help="Its folder or archive, downloaded if left out")
    parser.add_argument('--seed', type=int, default=None, help="Chooses the random cells, by default another one each time")
    parser.add_argument('--results', type=Path, default=root/'results')
    args = parser.parse_args(argv)
    data,rng = dict(cifar10=args.cifar, imagenette=args.imagenette),random.Random(args.seed)
    records = Records(args.results/'records.jsonl')
    if not (known := records.results()): parser.error(f"{records.file} has no results: pass --results with the folder of the records")
    cells = {o:f for o in tables(args.results) if len(f := o.cells(records, schedule))}
    try: todo = chosen(args.cell, cells, rng)
    except ValueError as e: parser.error(str(e))
    found = []
    for table,row,arm in todo:
        found.append(told := compared(table, row, arm, known, cells, args, data, rng))
        with open(args.results/'reruns.jsonl', 'a') as f: f.write(json.dumps(told)+'\n')
        now = f"{told['now']:.1f}" if 'now' in told else told.get('why') or f"about {told['minutes']:.0f} minutes"
        print(f"{told['table']}, {row}, {arm}, seed {told['seed']}: {told['recorded']:.1f} on record, {now}: {told['state']}", flush=True)
    bad = [f"{o['table']} {o['state']}" for o in found if o['state'] in ('differs','failed')]
    if bad: sys.exit(f"Differs from the record: {', '.join(bad)}")

if __name__=='__main__': main()
