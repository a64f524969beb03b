"""Does a sweep that is killed, again and again, end as one that is not? `python benchmarks/kills.py`

Runs `kdfast table sanity --schedule smoke` once without harm; then again, killed with SIGKILL at moments spread over its whole duration: by the clock, in
the middle of writing a checkpoint, or a record. Each time it is started again. At the end accuracies, curves and weights of all runs must
be those of the first, and no epoch that had been written to a checkpoint may have been trained again."""
import argparse, json, os, signal, subprocess, sys, tempfile, time
from pathlib import Path

def child(args):
    "One start of the command, in this process, which kills itself as `--at` asks"
    import io, threading
    from contextlib import contextmanager
    from kdfast import cli
    from kdfast.experiments import checkpoint, records
    kind,_,n = args.at.partition(':')
    count = dict(checkpoint=0, record=0, after=0)
    def die(): os.kill(os.getpid(), signal.SIGKILL)
    def due(what):
        count[what] += 1
        return what==kind and count[what]==int(n)
    write,save,whole_file = checkpoint.EpochCheckpoint._write,checkpoint.torch.save,records.whole_file
    def saved(o, file):
        if not (isinstance(o, dict) and 'fits' in o and due('checkpoint')): return save(o, file)
        whole = io.BytesIO()
        save(o, whole)
        Path(file).write_bytes(whole.getvalue()[:whole.tell()//2])
        die()
    def wrote(self):
        write(self)
        with (Path(args.out)/'epochs.txt').open('a') as f: f.write(f'{self.key} {self.nth} {self.learn.epoch}\n')
        if due('after'): threading.Timer(.1, die).start()
    @contextmanager
    def halved(dest):
        with whole_file(dest) as part:
            yield part
            if due('record'):
                part.write_bytes(part.read_bytes()[:part.stat().st_size//2])
                die()
    checkpoint.torch.save,checkpoint.EpochCheckpoint._write = saved,wrote
    records.whole_file = halved
    if kind=='time': threading.Timer(float(n), die).start()
    cli.main(['table', args.table, '--schedule', 'smoke', '--out', args.out, *args.more])
    os._exit(0)  # a timer may be waiting

def new(*args): return [sys.executable, *args]

def start(out, table, at='', more=(), python=new):
    "The exit code of one start, and its seconds"
    began = time.perf_counter()
    Path(out).mkdir(parents=True, exist_ok=True)
    command = python(__file__, '--child', '--table', table, '--out', str(out), '--at', at, '--', *more)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode not in (0, -signal.SIGKILL): sys.exit(done.stdout+done.stderr)
    return done.returncode,time.perf_counter()-began

def results(out):
    "What must be the same, by key"
    lines = map(json.loads, (Path(out)/'records.jsonl').read_text().splitlines())
    return {json.dumps(o['settings'], sort_keys=True): {k:o['result'][k] for k in ('accuracy','best','top5','history','weights')} for o in lines}

def epochs(out): return (Path(out)/'epochs.txt').read_text().splitlines()

def moments(kills, seconds, n_checkpoints, n_records):
    "Half of them by the clock, a third in checkpoints, the rest in records, spread over what one start would still do"
    in_checkpoints,in_records = max(1, kills//3),max(1, kills//6)
    by_clock = kills-in_checkpoints-in_records
    spread = lambda n, whole: [1+int((i+.5)*whole/n) for i in range(n)]
    return {**{f'time:{seconds*(i+.5)/by_clock:.1f}':None for i in range(by_clock)}, **{f'checkpoint:{i}':None for i in spread(in_checkpoints, n_checkpoints)},
        **{f'record:{i}':None for i in spread(in_records, n_records)}}

def trial(at, folder, table, more, whole, python=new):
    "One kill and one start after it: whether it was killed, and what is wrong at the end"
    out = Path(folder)/at.replace(':', '-')
    code,seconds = start(out, table, at, more, python)
    again,rest = start(out, table, '', more, python)
    trained = epochs(out)
    wrong = [*['not the same'] * (results(out)!=whole), *['an epoch twice'] * (len({*trained})!=len(trained)), *['did not end'] * (again!=0)]
    return code==-signal.SIGKILL,seconds,rest,len(trained),wrong

def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--kills', type=int, default=20)
    parser.add_argument('--table', default='sanity')
    parser.add_argument('--child', action='store_true', help=argparse.SUPPRESS)
    parser.add_argument('--out', help=argparse.SUPPRESS)
    parser.add_argument('--at', default='', help=argparse.SUPPRESS)
    parser.add_argument('more', nargs='*', help="More arguments of kdfast table, after --")
    args = parser.parse_args()
    if args.child: return child(args)
    with tempfile.TemporaryDirectory() as tmp:
        _,seconds = start(Path(tmp)/'whole', args.table, '', args.more)
        whole,n = results(Path(tmp)/'whole'),len(epochs(Path(tmp)/'whole'))
        rows = {at:trial(at, tmp, args.table, args.more, whole) for at in moments(args.kills, seconds, n, len(whole))}
    print(f"`kdfast table {args.table} --schedule smoke {' '.join(args.more)}`: {len(whole)} runs, {n} epochs, {seconds:.0f} s uninterrupted\n")
    print('| killed | after | then | at the end |\n|---|---|---|---|')
    for at,(killed,first,rest,trained,wrong) in rows.items():
        kind,_,where = at.partition(':')
        what = dict(time='by the clock', checkpoint=f'half through writing checkpoint {where}', record=f'half through writing record {where}')[kind]
        print(f"| {what if killed else 'too late'} | {first:.0f} s | {rest:.0f} s | {', '.join(wrong) or 'the same'} |")
    killed,inside = sum(o[0] for o in rows.values()),sum(o[0] and not k.startswith('time') for k,o in rows.items())
    print(f"\n{killed} kills, {inside} of them inside a write; {sum(not o[-1] for o in rows.values())} of {len(rows)} ended with the same accuracies, curves and weights, and no epoch on file was trained twice")
    sys.exit(any(o[-1] for o in rows.values()))

if __name__=='__main__': main()
