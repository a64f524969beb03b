"""Runs every notebook in a process of its own, then prints which took longest and which failed: `python tools/notebooks.py`

`nbdev-test` runs several in one process, where what one of them has patched into a class stays for the next."""
import multiprocessing, os, sys
from argparse import ArgumentParser
from multiprocessing.connection import wait
from pathlib import Path
from time import perf_counter
from nbdev.test import test_nb
import pandas, sklearn.datasets, torch, torchvision  # once, before the forks
if not torch.cuda.device_count(): import fastai.vision.all  # its import claims a GPU, which no fork could use then

root = Path(__file__).absolute().parent.parent
guides = 'howto','tutorials','explanation'

def one(nb): sys.exit(not test_nb(nb, skip_flags=['notest'], basepath=root)[0])

def run(books, n):
    "`(seconds, exit code, notebook)` of each, `n` at a time; what goes wrong is printed by the notebook's own process"
    fork,waiting,running,done = multiprocessing.get_context('fork'),[*books],{},[]
    while waiting or running:
        while waiting and len(running)<n:
            nb = waiting.pop(0)
            process = fork.Process(target=one, args=(nb,))
            process.start()
            running[process.sentinel] = process,nb,perf_counter()
        for o in wait([*running]):
            process,nb,began = running.pop(o)
            process.join()
            done.append((perf_counter()-began, process.exitcode, str(nb.relative_to(root/'nbs'))))
    return done

def main():
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--library', action='store_true', help=f"Leave out the guides, {', '.join(guides)}")
    args = parser.parse_args()
    # Tutorials, the longest, come first, so that no core waits for the last one
    books = [o for o in sorted((root/'nbs').rglob('*.ipynb'), reverse=True) if '.ipynb_checkpoints' not in o.parts and not (args.library and o.parent.name in guides)]
    done = run(books, os.cpu_count())
    for seconds,_,nb in sorted(done, reverse=True)[:10]: print(f'{seconds:3.0f} s  {nb}')
    failed = [nb for _,code,nb in done if code]
    if failed: sys.exit(f"Failed: {', '.join(sorted(failed))}")
    print(f'{len(done)} notebooks pass')

if __name__=='__main__': main()
