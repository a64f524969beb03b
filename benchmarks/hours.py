"""How long each table of the research takes here, all rows and arms, one seed: `python benchmarks/hours.py --out results`

Each network is trained for a step or two (as `kdfast table NAME --schedule full --dry-run` does), so this is what the published schedules cost on this machine, and not what anybody has run."""
import argparse, platform
from datetime import date
from pathlib import Path
import pandas as pd
from kdfast.experiments.research import research
from kdfast.experiments.sweep import with_controls
from kdfast.experiments.tables import estimate

def processor():
    "Its name, as Linux tells it"
    try: lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError: return platform.processor()
    return next((o.partition(': ')[2] for o in lines if o.startswith('model name')), platform.machine())

def hours(table, schedule, limit):
    "Number of runs, and their hours one after another"
    runs = with_controls(table.runs(schedule))
    return len(runs),estimate(runs, limit).minutes.sum()/60

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--schedules', default='short,full')
    parser.add_argument('--tables', default=','.join(research))
    parser.add_argument('--limit', type=float, default=60., help="Seconds after which no further network of a table is measured")
    parser.add_argument('--out', type=Path, default=Path('results'))
    args = parser.parse_args(argv)
    rows = []
    for name in args.tables.split(','):
        told = {}
        for schedule in args.schedules.split(','):
            n,told[f'{schedule}, hours'] = hours(research[name], schedule, args.limit)
        rows.append(dict(table=name, data=research[name].data, runs=n, **{k:round(v, 1) for k,v in told.items()}))
        print(rows[-1], flush=True)
    table = pd.DataFrame(rows)
    table['measured'] = f'{date.today()}, {processor()}'
    args.out.mkdir(parents=True, exist_ok=True)
    table.to_csv(args.out/'hours.csv', index=False)

if __name__=='__main__': main()
