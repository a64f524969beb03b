"""What a GPU makes of kdfast, in at most eight minutes: `make bench-gpu`

    python benchmarks/gpu.py --out OUT

Each part runs in a process of its own, so that a fault in one does not end the others: the machine, the tests marked cuda, what a step costs beside a loop by
hand, what each method costs and how often it makes the GPU wait, how fast images in memory are augmented, a compiled teacher, and in the time that is left CIFAR-10. Seconds a step are the difference
of a long and a short fit, so what a fit costs once does not count. One table is printed; OUT/gpu.json and OUT/gpu.md are written anew after every row, so they
are there, and name what is missing, when a part fails, hangs or has no time left. Wheels in .wheels (`make wheels`), for a machine without a package index, are
used if they are there. `--device cpu --tiny` tries the script itself."""
import json, os, shutil, signal, subprocess, sys, tempfile
from argparse import ArgumentParser
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from threading import Timer
from time import perf_counter

root = Path(__file__).absolute().parent.parent

# The parts: each yields rows, dictionaries with `what`, and a `value` or numbers

def _version(name):
    try: return version(name)
    except PackageNotFoundError: return 'not there'

def machine(args):
    yield dict(what='python', value=sys.version.split()[0])
    for o in ('torch','torchvision','fastai','fastcore','timm','torchdistill','fasterai','torch-pruning'): yield dict(what=o, value=_version(o))
    import torch
    from kdfast.devices import native_bf16
    yield dict(what='bfloat16', value='native' if native_bf16(torch.device(args.device)) else 'emulated')
    if args.device=='cpu': return
    gpu = torch.cuda.get_device_properties(0)
    yield dict(what='GPU', value=f'{gpu.name}, {gpu.total_memory/1e9:.0f} GB, {gpu.multi_processor_count} multiprocessors, compute capability {gpu.major}.{gpu.minor}')
    yield dict(what='CUDA, cuDNN', value=f'{torch.version.cuda}, {torch.backends.cudnn.version()}')
    yield dict(what='convolutions in float32', value='TF32' if torch.backends.cudnn.allow_tf32 else 'float32')

class Told:
    "A pytest plugin that hands on each outcome as it comes"
    def __init__(self, emit): self.emit,self.n = emit,0

    def pytest_runtest_logreport(self, report):
        if report.outcome=='passed' and report.when!='call': return
        self.n += 1
        text = dict(log=report.longreprtext[-3000:]) if report.failed else {}
        self.emit(dict(what=report.nodeid.split('::', 1)[1], value=report.outcome, **text))

def tests(args):
    import pytest
    several = ['-n','8','--dist','worksteal'] if args.device=='cuda' else []
    chosen = ['-k','augmentation or waits and (crd or kd)'] if args.tiny else []
    files = [str(root/'tests'/f'test_{o}.py') for o in ('cuda','methods','processes')]
    told = Told(args.emit)
    code = pytest.main([*files, '-m', 'cuda', '-p', 'no:cacheprovider', '--tb=short', *several, *chosen], plugins=[told])
    if code not in (0, 1) or not told.n: raise RuntimeError(f'pytest ended with {code} after {told.n} tests')
    return ()

def per_step(f, n, device):
    "Seconds of one step more"
    from bench import seconds
    return (3*seconds(f, 3*n, device)-seconds(f, n, device))/2

def in_turns(ways, args):
    "Lists of seconds a step, all contestants one after another, until there are enough turns or no time"
    import torch
    n,turns = (1,1) if args.tiny else (10,5)
    times = {k:[] for k in ways}
    while len(next(iter(times.values())))<turns and (perf_counter()<args.end or not all(times.values())):
        for k,f in ways.items(): times[k].append(per_step(f, n, torch.device(args.device)))
    return times

def works(tiny):
    from bench import Work
    from kdfast.models.nets import resnet, wrn
    groups = ['group1','group2','group3']
    if tiny: return [lambda: Work('WRN-10-2 to WRN-10-1, 4 images of 32 px', wrn(10, 2), wrn(10, 1), 32, 4, groups)]
    return [lambda: Work('WRN-40-2 to WRN-16-1, 128 images of 32 px', wrn(40, 2), wrn(16, 1), 32, 128, groups),
        lambda: Work('ResNet-34 to ResNet-18, 64 images of 224 px', resnet(34), resnet(18), 224, 64, ['layer1','layer2','layer3','layer4'])]

def step(args, compiled=False):
    "KD and AT by each contestant; one that fails is left out"
    import bench, torch
    for make in works(args.tiny):
        work = make()
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False): err = bench.gradient_error(work, 'KD+AT')
        yield dict(what=f"{work.name}, gradients beside the loop's, without TF32", value=f'{err:.1e}' + ('' if err<1e-3 else ': they differ, so nothing is timed'))
        if not err<1e-3: continue
        ways,memory = {},{}
        for who,make_way in bench.contestants(work, 'KD+AT').items():
            if (who=='kdfast, compiled')!=compiled and who not in ('plain student','teacher forward','loop by hand','kdfast'): continue
            try:
                ways[who] = make_way()
                memory[who] = bench.peak(ways[who], work.device)
            except Exception as e:
                ways.pop(who, None)
                yield dict(what=f'{work.name}, {who}', value=f'{type(e).__name__}: {e}')
        yield from bench.rows('step', work.name, in_turns(ways, args), 'loop by hand', memory, ('plain student','teacher forward'))

def compiled(args): return step(args, compiled=True)

def methods(args):
    "Each method alone beside a plain learner, in training from images in memory"
    import bench, torch
    from conftest import waits_of
    from fastai.callback.core import Callback, CancelFitException
    from kdfast.all import digits_stats, distill_learner, tensor_dls, wrn
    from kdfast.experiments.spec import methods, terms_of
    device,n,bs = torch.device(args.device),*((160,8) if args.tiny else (10_000,128))
    x,(teacher,student) = torch.randint(256, (n,3,32,32), dtype=torch.uint8),((wrn(10, 2),wrn(10, 1)) if args.tiny else (wrn(40, 2),wrn(16, 1)))
    dls = tensor_dls((x, torch.arange(n)%10), (x[:64], torch.arange(64)%10), bs=bs, stats=digits_stats, device=device)
    class Until(Callback):
        order,run_valid = 1000,False
        def __init__(self, n): self.n = n
        def after_batch(self):
            if self.iter+1>=self.n: raise CancelFitException
    def way(*terms):
        learn = distill_learner(dls, teacher if any(t.taught for t in terms) else None, bench.deepcopy(student), cbs=[*terms], opt_func=bench.sgd)
        def f(n):
            with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-5, cbs=Until(n))
        return learn,f
    way()[1](2)  # workspaces of libraries, which would count for the first
    learn,plain = way()
    base,alone = bench.peak(plain, device),waits_of(learn)
    if device.type=='cuda' and not alone: raise RuntimeError('fastai itself waits in every step, and none of it was seen: the count means nothing')
    yield dict(what='plain learner', mb=base/1e6, waits=alone)
    for name in ['kd','at','crd'] if args.tiny else [o for o in methods() if o!='sigmoidkd']:
        try:
            learn,f = way(*terms_of(name))
            mb,waits = bench.peak(f, device)/1e6,waits_of(learn)
            times = in_turns({'plain learner':plain, name:f}, args)
            yield dict(what=name, ms=1e3*bench.median(times[name]), ratio=bench.ratio(times, name, 'plain learner'), of='plain learner', mb=mb, waits=waits)
        except Exception as e: yield dict(what=name, value=f'{type(e).__name__}: {e}')

def loader(args):
    "Images a second that are shifted and mirrored in memory, on the device"
    import torch
    from bench import seconds
    from kdfast.all import BatchFlip, BatchShift, digits_stats, tensor_dls
    n = 512 if args.tiny else 50_000
    x = torch.randint(256, (n,3,32,32), dtype=torch.uint8)
    dls = tensor_dls((x, torch.arange(n)%10), (x[:64], torch.arange(64)%10), bs=128, tfms=[BatchShift(),BatchFlip()], stats=digits_stats, device=torch.device(args.device))
    def epochs(k): return [b for _ in range(k) for b in dls.train] and None
    epochs(1)
    yield dict(what=f'images a second, {n:,} of 32 px in memory', value=f'{n/seconds(epochs, 2, torch.device(args.device)):,.0f}')

def sanity(args):
    """Rows of `kdfast table sanity` on CIFAR-10, teachers first, for as long as a run is likely to end in time

    OUT/sanity.jsonl has every finished run, and the teachers' weights lie next to it: `Records('results/records.jsonl').take(file)` adds them to the records."""
    from kdfast.experiments.research import table_of
    from kdfast.experiments.sweep import Sweep
    if not args.tiny and not (args.cifar and args.cifar.is_file()): raise FileNotFoundError('no archive of CIFAR-10: make wheels CIFAR=path, or --cifar path')
    table,schedule = table_of('sanity'),'smoke' if args.tiny else 'short'
    chosen = dict(rows=['16-1 from 16-2'], arms=['KD']) if args.tiny else dict(seeds=3)
    path,took = None if args.tiny else args.cifar,0.
    with tempfile.TemporaryDirectory() as folder:
        whole = Sweep('sanity', table.runs(schedule, **chosen), folder, path)
        for run in whole.runs:
            if perf_counter()+1.2*took>args.end: return
            start = perf_counter()
            Sweep('sanity', [run], folder, path, command=f'kdfast table sanity --schedule {schedule} --seeds 3').run()
            took,result = perf_counter()-start,whole.records.get(run)
            shutil.copy(whole.records.file, args.out/'.sanity')
            (args.out/'.sanity').replace(args.out/'sanity.jsonl')
            if any(run in o.needs for o in whole.runs): shutil.copy(whole.file_of(run), args.out)
            yield dict(what=str(run), value=f"{result['accuracy']:.2%} in {result['seconds']:.0f} s")

parts = {f.__name__:(f,seconds) for f,seconds in ((machine,90), (tests,150), (step,120), (methods,120), (loader,90), (compiled,120), (sanity,480))}  # at most so many seconds

# The record

units = dict(ms='{:,.2f} ms', ratio='{:.2f} times', of='{}', above='{:.2f} teacher forwards above plain', mb='{:,.0f} MB', waits='{:g} waits a step')

def line(part, row):
    told = [str(row['value'])] if 'value' in row else []
    told += [f.format(row[k]) for k,f in units.items() if row.get(k) is not None]
    what = ', '.join(str(row[k]) for k in ('work','who','what') if k in row)
    return f"| {part} | {what} | {', '.join(told).replace('times, ', 'times ')} |".replace('\n', ' ')

def table(record):
    lines = ['| part | what | result |', '|---|---|---|']
    for o in record['parts']:
        rows,quiet = o['rows'],('passed','skipped') if o['name']=='tests' else ()
        rows = [dict(what=k, value=sum(r.get('value')==k for r in rows)) for k in quiet] + [r for r in rows if r.get('value') not in quiet]
        lines += [*(line(o['name'], r) for r in rows), f"| {o['name']} | {o['state']} | {o['seconds']:.0f} s |"]
    return '\n'.join(lines)

def write(record, out):
    for name,text in (('gpu.json', json.dumps(record, indent=0)), ('gpu.md', f"`{record['command']}`, {record['started']}, commit {record['commit']}\n\n{table(record)}\n")):
        (out/f'.{name}').write_text(text)
        (out/f'.{name}').replace(out/name)

# Running parts

def kill(p):
    try: os.killpg(p.pid, signal.SIGKILL)
    except ProcessLookupError: pass

def run(name, args, seconds, env, on_row):
    "State of a part that has `seconds`, and the end of what it printed where it failed"
    read,written = os.pipe()
    command = [sys.executable, '-W', 'ignore', __file__, '--part', name, '--device', args.device, '--seconds', str(seconds), '--rows', str(written), '--out', str(args.out), *['--tiny']*args.tiny, *(['--cifar', str(args.cifar)] if args.cifar else [])]
    with tempfile.TemporaryFile('w+') as printed:
        p = subprocess.Popen(command, stdout=printed, stderr=subprocess.STDOUT, env=env, cwd=root, start_new_session=True, pass_fds=[written])
        os.close(written)
        late = []
        timer = Timer(seconds, lambda: (late.append(True), kill(p)))
        timer.start()
        try:
            with os.fdopen(read) as rows:
                for text in rows: on_row(json.loads(text))
            code = p.wait()
        finally:
            timer.cancel()
            kill(p)  # workers that it has left
        printed.seek(0)
        return ('out of time',None) if late else ('done',None) if not code else (f'failed with {code}',printed.read()[-4000:])

def part(args):
    "Run one part here"
    with os.fdopen(args.rows, 'w', buffering=1) as rows:
        args.emit,args.end = lambda row: rows.write(json.dumps(row)+'\n'),perf_counter()+.8*args.seconds
        for row in parts[args.part][0](args): args.emit(row)

def environment(args):
    "What the parts run in: this checkout, and the wheels beside it; raises `CalledProcessError` where these cannot be installed"
    paths,wheels = [root, root/'tests', root/'benchmarks'],sorted((root/'.wheels').glob('*.whl'))
    if wheels:
        paths.append(site := tempfile.mkdtemp())
        subprocess.run([sys.executable, '-m', 'pip', 'install', '-q', '--no-index', '--no-deps', '--no-compile', '--target', site, *map(str, wheels)], check=True)
    hidden = dict(CUDA_VISIBLE_DEVICES='') if args.device=='cpu' else {}
    path = os.pathsep.join(map(str, [*paths, *filter(None, [os.environ.get('PYTHONPATH')])]))
    return {**os.environ, **hidden, 'PYTHONPATH':path, 'OMP_NUM_THREADS':'1' if args.device=='cpu' else '2'}

def commit():
    try: git = subprocess.run(['git','-C',str(root),'describe','--always','--dirty'], capture_output=True, text=True).stdout.strip()
    except OSError: git = ''
    return git or os.environ.get('COMMIT')

def main(argv=None):
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--out', type=Path, default=Path('gpu'), help="Folder of gpu.json and gpu.md")
    parser.add_argument('--device', default='cuda', choices=('cuda','cpu'))
    parser.add_argument('--tiny', action='store_true', help="Small networks and few steps, to try the script")
    parser.add_argument('--minutes', type=float, default=8., help="After which nothing further is run")
    parser.add_argument('--parts', default=','.join(parts))
    parser.add_argument('--cifar', type=Path, default=next((root/'.wheels').glob('cifar10.*'), None), help="Archive of CIFAR-10, by default that in .wheels")
    for o,kind in dict(part=str, seconds=float, rows=int).items(): parser.add_argument(f'--{o}', type=kind, help="For the processes of the parts")
    args = parser.parse_args(argv)
    if args.part: return part(args)
    odd = [o for o in args.parts.split(',') if o not in parts]
    if odd: parser.error(f"unknown part {', '.join(odd)}: choose from {', '.join(parts)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a part does not outlive this process
    args.out.mkdir(parents=True, exist_ok=True)
    end = perf_counter()+60*args.minutes
    record = dict(command=' '.join(['python','benchmarks/gpu.py', *(sys.argv[1:] if argv is None else argv)]), started=datetime.now(timezone.utc).isoformat(timespec='seconds'), commit=commit(), parts=[])
    def begin(name):
        record['parts'].append(dict(name=name, state='running', seconds=0., rows=[]))
        return record['parts'][-1],perf_counter()
    def finish(o, start, state, error=None):
        o.update(state=state, seconds=perf_counter()-start)
        if error is not None: o['rows'].append(dict(what='error', value=(error.strip() or state).splitlines()[-1], log=error))
        write(record, args.out)
        print(f"{o['name']}: {state}", file=sys.stderr)
    o,start = begin('environment')
    try: env = environment(args)
    except subprocess.CalledProcessError as e: env,state = None,f'failed, {e}'
    finish(o, start, 'done' if env else state)
    for name in args.parts.split(',') if env else ():
        (o,start),left = begin(name),min(parts[name][1], end-perf_counter())
        def on_row(row):
            o['rows'].append(row)
            write(record, args.out)
        finish(o, start, *(run(name, args, left, env, on_row) if left>1 else ('not run, no time left',)))
    print(table(record))
    bad = [o['name'] for o in record['parts'] if o['state']!='done' or any(r.get('value')=='failed' for r in o['rows'])]
    if bad: sys.exit(f"Not all is well: {', '.join(bad)}. Details in {args.out/'gpu.json'}")

if __name__=='__main__': main()
