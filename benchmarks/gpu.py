"""What a GPU makes of kdfast, in at most eight minutes: `make bench-gpu`

    python benchmarks/gpu.py --out OUT

Each part runs in a process of its own, so that a fault in one does not end the others: what the machine is, the tests marked cuda, what a step costs beside a loop by hand, what each method costs and how often it
makes the GPU wait, and how fast images in memory are augmented. One table is printed; OUT/gpu.json and OUT/gpu.md are written anew after every row, so they are there, and name what is missing, when a part fails,
hangs or has no time left. Wheels in .wheels, which `make wheels` downloads for a machine without a registry, are used if they are there. `--device cpu --tiny` tries the script itself."""
import json, os, signal, subprocess, sys, tempfile
from argparse import ArgumentParser
from datetime import datetime, timezone
from pathlib import Path
from threading import Timer
from time import perf_counter

root = Path(__file__).absolute().parent.parent

# The parts: each yields rows, dictionaries with `what`, and a `value` or what `bench.rows` gives

def machine(args):
    import torch
    from importlib.metadata import PackageNotFoundError, version
    for o in ('torch','torchvision','fastai','fastcore','timm','torchdistill','torch-pruning'):
        try: yield dict(what=o, value=version(o))
        except PackageNotFoundError: yield dict(what=o, value='not there')
    yield dict(what='python', value=sys.version.split()[0])
    if args.device=='cpu': return
    gpu = torch.cuda.get_device_properties(0)
    yield dict(what='GPU', value=f'{gpu.name}, {gpu.total_memory/1e9:.0f} GB, {gpu.multi_processor_count} multiprocessors, compute capability {gpu.major}.{gpu.minor}')
    yield dict(what='CUDA, cuDNN', value=f'{torch.version.cuda}, {torch.backends.cudnn.version()}')
    from kdfast.frozen import native_bf16
    yield dict(what='bfloat16', value='native' if native_bf16(torch.device('cuda')) else 'emulated')

def tests(args):
    "Outcomes as they come"
    several = ['-n','4'] if args.device=='cuda' and not args.tiny else []
    chosen = ['-k','augmentation or waits and (crd or kd)'] if args.tiny else []
    files = [root/'tests'/f'test_{o}.py' for o in ('cuda','methods','processes')]
    command = [sys.executable, '-m', 'pytest', *files, '-m', 'cuda', '-o', 'addopts=', '-v', '--color=no', '-p', 'no:cacheprovider', '--durations=5', '--tb=short', *several, *chosen]
    running = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=root)
    told,n,outcomes = [],0,('PASSED','FAILED','ERROR','SKIPPED')
    for line in running.stdout:
        told.append(line)
        words = line.split()
        found,name = next((o for o in words if o in outcomes), None),next((o for o in words if '::' in o), None)
        n += bool(found)
        if found and name and not line.startswith(outcomes): yield dict(what=name.split('::')[1], value=found.lower())
        elif line.startswith(('FAILED','ERROR')): yield dict(what=name.split('::')[1] if name else 'pytest', value=line.partition(' - ')[2].strip() or line.strip())
    if running.wait() not in (0, 1) or not n: raise RuntimeError(''.join(told[-30:]))
    if running.returncode: yield dict(what='pytest', log=''.join(told)[-20_000:])

def _works(tiny):
    from kdfast.models import resnet, wrn
    wide = lambda a,b,bs: bench().Work(f"WRN-{'-'.join(map(str, a))} to WRN-{'-'.join(map(str, b))}, {bs} images of 32 px", wrn(*a), wrn(*b), 32, bs, ['group1','group2','group3'])
    if tiny: return [lambda: wide((10,2), (10,1), 4)]
    return [lambda: wide((40,2), (16,1), 128), lambda: bench().Work('ResNet-34 to ResNet-18, 64 images of 224 px', resnet(34), resnet(18), 224, 64, ['layer1','layer2','layer3','layer4'])]

def bench():
    import bench
    return bench

def step(args):
    "KD and AT by each contestant; one that fails is left out"
    import torch
    device,steps,turns = torch.device(args.device),*((1,1) if args.tiny else (20,7))
    for make in _works(args.tiny):
        work = make()
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False): err = bench().gradient_error(work, 'KD+AT')
        yield dict(what=f"{work.name}, gradients beside the loop's, without TF32", value=f'{err:.1e}')
        if not err<1e-3: raise RuntimeError(f"{work.name}: kdfast's gradients differ from the loop's by {err:.1e}, so there is nothing to compare")
        ways,memory = {},{}
        for who,way in bench().contestants(work, 'KD+AT').items():
            try:
                ways[who] = way()
                memory[who] = bench().peak(ways[who], device)
            except Exception as e:
                ways.pop(who, None)
                yield dict(what=f'{work.name}, {who}', value=f'{type(e).__name__}: {e}')
        yield from bench().rows('step', work.name, bench().interleaved(ways, steps, turns, device), 'loop by hand', memory, ('plain student','teacher forward'))

def waits(f, device):
    "Times a step makes Python wait for the device; on a CPU, numbers that it reads"
    from torch.profiler import ProfilerActivity, profile
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA]*(device.type=='cuda')
    counted = ('cudaStreamSynchronize','cudaDeviceSynchronize','cudaEventSynchronize') if device.type=='cuda' else ('aten::_local_scalar_dense',)
    def count(n):
        with profile(activities=kinds) as prof: f(n)
        return sum(o.count for o in prof.key_averages() if o.key in counted)
    f(2)
    return (count(6)-count(2))/4

def methods(args):
    "Each method alone: a step's time and memory beside a plain learner's, and its waits"
    import torch
    from fastai.vision.all import DataLoaders, CrossEntropyLossFlat, partial
    from kdfast.all import digits_stats, distill_learner, tensor_dls, wrn
    from kdfast.names import methods, terms_of
    device,n,bs = torch.device(args.device),*((80,8) if args.tiny else (50_000,128))
    x,(teacher,student) = torch.randint(256, (n,3,32,32), dtype=torch.uint8),((wrn(10, 2),wrn(10, 1)) if args.tiny else (wrn(40, 2),wrn(16, 1)))
    dls = tensor_dls((x, torch.arange(n)%10), (x[:64], torch.arange(min(n, 64))%10), bs=bs, stats=digits_stats, device=device)
    class Way(bench().Fastai):
        "Training from a loader that numbers its images"
        def __init__(self, *terms):
            asks = any(t.taught for t in terms)
            self.learn = distill_learner(dls, teacher if asks else None, bench().deepcopy(student), cbs=[*terms], opt_func=bench().sgd)
        def __call__(self, n):
            from fastai.vision.all import CancelFitException, Callback
            class Some(Callback):
                order,run_valid = 1000,False
                def after_batch(self):
                    if self.iter+1>=n: raise CancelFitException
            with self.learn.no_bar(), self.learn.no_logging(): self.learn.fit(1, 1e-5, cbs=Some())
    plain,names = Way(),['kd','at','crd'] if args.tiny else [o for o in methods() if o!='sigmoidkd']
    yield dict(what='plain learner', mb=bench().peak(plain, device)/1e6, waits=waits(plain, device))
    for name in names:
        try:
            way = Way(*terms_of(name))
            mb = bench().peak(way, device)/1e6
            times = bench().interleaved({'plain learner':plain, name:way}, *((2,1) if args.tiny else (20,3)), device)
            yield dict(what=name, ratio=bench().ratio(times, name, 'plain learner'), of='plain learner', ms=1e3*bench().median(times[name]), mb=mb, waits=waits(way, device))
        except Exception as e: yield dict(what=name, value=f'{type(e).__name__}: {e}')

def loader(args):
    "Images a second that are shifted and mirrored in memory, on the device"
    import torch
    from kdfast.all import BatchFlip, BatchShift, digits_stats, tensor_dls
    n = 512 if args.tiny else 50_000
    x = torch.randint(256, (n,3,32,32), dtype=torch.uint8)
    dls = tensor_dls((x, torch.arange(n)%10), (x[:64], torch.arange(64)%10), bs=128, tfms=[BatchShift(),BatchFlip()], stats=digits_stats, device=torch.device(args.device))
    def epochs(k):
        for _ in range(k):
            for _ in dls.train: pass
    epochs(1)
    yield dict(what=f'images a second, {n:,} of 32 px in memory', value=f'{n/bench().seconds(epochs, 2, torch.device(args.device)):,.0f}')

parts = {'machine':(machine,30), 'tests':(tests,170), 'step':(step,150), 'methods':(methods,100), 'loader':(loader,30)}  # and the seconds that each has at most

# The record

def line(part, row):
    if 'log' in row and 'value' not in row: return None
    told = [str(row['value'])] if 'value' in row else []
    told += [f.format(row[k]) for k,f in dict(ms='{:,.2f} ms', ratio='{:.2f} times', of='{}', above='{:.2f} teacher forwards above plain', mb='{:,.0f} MB', waits='{:g} waits a step').items() if row.get(k) is not None]
    what = ', '.join(str(row[k]) for k in ('work','who','what') if k in row)
    return f"| {part} | {what} | {', '.join(told).replace('times, ', 'times ')} |".replace('\n', ' ')

def table(record):
    lines = ['| part | what | result |', '|---|---|---|']
    for o in record['parts']:
        found = [r for r in o['rows'] if not (o['name']=='tests' and r.get('value') in ('passed','skipped'))]
        if o['name']=='tests': found = [dict(what=k, value=sum(r.get('value')==k for r in o['rows'])) for k in ('passed','skipped')] + found
        lines += [*filter(None, (line(o['name'], r) for r in found)), f"| {o['name']} | {o['state']} | {o['seconds']:.0f} s |"]
    return '\n'.join(lines)

def write(record, out):
    for name,text in (('gpu.json', json.dumps(record, indent=0)), ('gpu.md', f"`{record['command']}`, {record['started']}, commit {record['commit']}\n\n{table(record)}\n")):
        (out/f'.{name}').write_text(text)
        (out/f'.{name}').replace(out/name)

def run(name, args, seconds, env, on_row):
    "State of a part that has `seconds`, and the end of what it printed where it failed"
    command = [sys.executable, '-W', 'ignore', __file__, '--part', name, '--device', args.device, *['--tiny']*args.tiny]
    with tempfile.TemporaryFile('w+') as errors:
        p = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=env, cwd=root, start_new_session=True)
        late = []
        def end():
            late.append(True)
            os.killpg(p.pid, signal.SIGKILL)
        timer = Timer(seconds, end)
        timer.start()
        for text in p.stdout:
            if text.startswith('{'): on_row(json.loads(text))
        code = p.wait()
        timer.cancel()
        errors.seek(0)
        return ('out of time',None) if late else ('done',None) if not code else ('failed',errors.read()[-4000:])

def environment(args):
    "What the parts run in: this checkout, and wheels where they lie beside it"
    paths,wheels = [root, root/'tests', root/'benchmarks'],sorted((root/'.wheels').glob('*.whl'))
    if wheels:
        paths.append(site := tempfile.mkdtemp())
        subprocess.run([sys.executable, '-m', 'pip', 'install', '-q', '--no-index', '--no-deps', '--no-compile', '--target', site, *map(str, wheels)], check=True)
    hidden = dict(CUDA_VISIBLE_DEVICES='') if args.device=='cpu' else {}
    return {**os.environ, **hidden, 'PYTHONPATH':os.pathsep.join(map(str, [*paths, os.environ.get('PYTHONPATH', '')])), 'PYTHONUNBUFFERED':'1'}

def commit():
    found = subprocess.run(['git','rev-parse','--short','HEAD'], capture_output=True, text=True, cwd=root).stdout.strip()
    return found or os.environ.get('COMMIT')

def main(argv=None):
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--out', type=Path, default=Path('gpu'), help="Folder of gpu.json and gpu.md")
    parser.add_argument('--device', default='cuda', choices=('cuda','cpu'))
    parser.add_argument('--tiny', action='store_true', help="Small networks and few steps, to try the script")
    parser.add_argument('--minutes', type=float, default=8., help="After which nothing further is run")
    parser.add_argument('--parts', default=','.join(parts))
    parser.add_argument('--part', help="Run this one here, and print its rows as JSON lines")
    args = parser.parse_args(argv)
    if args.part:
        for row in parts[args.part][0](args): print(json.dumps(row), flush=True)
        return
    odd = [o for o in args.parts.split(',') if o not in parts]
    if odd: parser.error(f"unknown part {', '.join(odd)}: choose from {', '.join(parts)}")
    args.out.mkdir(parents=True, exist_ok=True)
    end,env = perf_counter()+60*args.minutes,environment(args)
    record = dict(command=f"python benchmarks/gpu.py {' '.join(sys.argv[1:] if argv is None else argv)}".strip(), started=datetime.now(timezone.utc).isoformat(timespec='seconds'), commit=commit(), parts=[])
    for name in args.parts.split(','):
        start,part = perf_counter(),dict(name=name, state='running', seconds=0., rows=[])
        record['parts'].append(part)
        def on_row(row):
            part['rows'].append(row)
            write(record, args.out)
        left = min(parts[name][1], end-start)
        part['state'],error = run(name, args, left, env, on_row) if left>1 else ('not run, no time left',None)
        part['seconds'] = perf_counter()-start
        if error: part['rows'].append(dict(what='error', value=error.strip().splitlines()[-1], log=error))
        write(record, args.out)
        print(f"{name}: {part['state']}", file=sys.stderr)
    print(table(record))
    failed = [o['name'] for o in record['parts'] if o['state'] not in ('done','not run, no time left','out of time') or any(r.get('value') in ('failed','error') for r in o['rows'])]
    if failed: sys.exit(f"Failed: {', '.join(failed)}. Details in {args.out/'gpu.json'}")

if __name__=='__main__': main()
