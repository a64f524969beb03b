"""Runs every notebook in a process of its own, then prints which took longest and which failed: `python tools/notebooks.py`

Those whose lessons are about precision run twice, the second time as if the processor were of the other kind: with native bfloat16 if it has none, and without if it has. `nbdev-test` runs several in one process, where what one of them has patched into a class stays for the next."""
import json, multiprocessing, os, re, sys
from argparse import ArgumentParser
from multiprocessing.connection import wait
from pathlib import Path
from time import perf_counter
from nbdev.test import test_nb
import pandas, sklearn.datasets, torch, torchvision  # once, before the forks
if not torch.cuda.device_count(): import fastai.vision.all  # its import claims a GPU, which no fork could use then

root = Path(__file__).absolute().parent.parent
guides = 'howto','tutorials','explanation','start'

def lessons_of(nb):
    "The code that a notebook does not export"
    cells = [''.join(c['source']) for c in json.loads(nb.read_text())['cells'] if c['cell_type']=='code']
    return '\n'.join(o for o in cells if not o.startswith('#| export'))

def about_precision(nb): return re.search(r'\bprecision\b|bf16|Frozen', lessons_of(nb))

def one(nb, other):
    "Run `nb` in this process, if `other` on the other kind of processor"
    if other:
        from kdfast.devices import native_bf16
        os.environ['KDFAST_NATIVE_BF16'] = str(int(not native_bf16(torch.device('cpu'))))
    sys.exit(not test_nb(nb, skip_flags=['notest'], basepath=root)[0])

def name_of(nb, other=False): return str(nb.relative_to(root/'nbs')) + ', other processor'*other

def run(jobs, n):
    "`(seconds, exit code, name)` of each notebook, `n` at a time; what goes wrong is printed by the notebook's own process"
    fork,waiting,running,done = multiprocessing.get_context('fork'),[*jobs],{},[]
    while waiting or running:
        while waiting and len(running)<n:
            job = waiting.pop(0)
            process = fork.Process(target=one, args=job)
            process.start()
            running[process.sentinel] = process,job,perf_counter()
        for o in wait([*running]):
            process,job,began = running.pop(o)
            process.join()
            done.append((perf_counter()-began, process.exitcode, name_of(*job)))
    return done

def main():
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--library', action='store_true', help=f"Each once, and without the guides, {', '.join(guides)}")
    args = parser.parse_args()
    # Tutorials, the longest, come first, so that no core waits for the last one
    books = [o for o in sorted((root/'nbs').rglob('*.ipynb'), reverse=True) if '.ipynb_checkpoints' not in o.parts and not (args.library and {o.parent.name,o.stem} & {*guides})]
    again = set() if args.library else {*filter(about_precision, books)}
    done = run([(o,other) for o in books for other in ([False,True] if o in again else [False])], os.cpu_count())
    for seconds,_,name in sorted(done, reverse=True)[:10]: print(f'{seconds:3.0f} s  {name}')
    failed = [name for _,code,name in done if code]
    if failed: sys.exit('\n'.join(['Failed:', *sorted(failed)]))
    print(f'{len(books)} notebooks pass' + f', {len(again)} of them on the other kind of processor as well'*bool(again))

if __name__=='__main__': main()
