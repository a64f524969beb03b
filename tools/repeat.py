"""Do the tests and lessons that train something hold for every seed, for one thread and two, and whatever the processor? `python tools/repeat.py --times 10`

Each repetition runs them all in processes of its own, with another PYTHONHASHSEED, another number of threads (one, two, or OMP_NUM_THREADS unset), another answer to "is bfloat16 native?", and another seed: whatever
Python, NumPy and torch are seeded with is shifted by the number of the repetition, 0 in the first. The first runs every quick test and learns which of them fit a learner; the others repeat those alone. Prints what failed and under which settings."""
import json, os, re, subprocess, sys, tempfile
import xml.etree.ElementTree as ET
from argparse import ArgumentParser
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

root = Path(__file__).absolute().parent.parent
shifted = '''import os, random, sys
from importlib.util import find_spec
by = int(os.environ['KDFAST_SHIFT_SEEDS'])
def shift(seed):
    def shifted(s=None, *args, **kwargs): return seed(s+by if isinstance(s, int) else s, *args, **kwargs)
    return shifted
class AfterTorch:
    "Importing torch here would be seen by tests of what is imported"
    def find_spec(self, name, path=None, target=None):
        if name!='torch': return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        load = spec.loader.exec_module
        def exec_module(torch):
            load(torch)
            import numpy
            for o,k in ((random,'seed'),(numpy.random,'seed'),(torch,'manual_seed')): setattr(o, k, shift(getattr(o, k)))
            torch.manual_seed(0)
        spec.loader.exec_module = exec_module
        return spec
sys.meta_path.insert(0, AfterTorch())
'''
notes = '''import pytest
from fastai.learner import Learner
trained,fit = [],Learner._do_fit
def noted(self, *args, **kwargs):
    trained.append(1)
    return fit(self, *args, **kwargs)
Learner._do_fit = noted
@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    trained.clear()
    return (yield)
@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if trained and report.when=='teardown': report.user_properties.append(('trains',item.nodeid))
    return report
'''

def settings(i):
    "What repetition `i` sets. Every fourth leaves the number of threads to torch"
    threads = {} if i%4==3 else dict(OMP_NUM_THREADS=str(1+i%2))
    if i%2: threads['OMP_WAIT_POLICY'] = 'passive'   # a thread that spins at the end of every operation stops the other where anything else runs
    return dict(PYTHONHASHSEED=str(i), **threads, KDFAST_NATIVE_BF16=str((i//2+i//4)%2), KDFAST_SHIFT_SEEDS=str(i))

def workers(env):
    "Processes beside each other, each of which has its threads to itself: two that share a core wait for each other at every operation"
    cores = len(os.sched_getaffinity(0))
    return max(1, cores//int(env.get('OMP_NUM_THREADS', cores)))

def teaches(nb):
    "Whether a notebook fits a learner"
    code = ''.join(''.join(c['source']) for c in json.loads(nb.read_text())['cells'] if c['cell_type']=='code')
    return re.search(r'\.fit|\.fine_tune|do_run|\.run\(', code)

def tests(env, chosen, folder):
    "Node ids of tests that train, and of those that failed with what they said"
    file,names = folder/'junit.xml',folder/'names'
    names.write_text('\n'.join(chosen))
    which = [f'@{names}'] if chosen else ['tests','-m','not slow']
    subprocess.run([sys.executable, '-m', 'pytest', '-n', str(workers(env)), '--dist', 'worksteal', '-p', 'no:cacheprovider', '-p', 'kdfast_notes', '--tb=line', f'--junitxml={file}', *which], cwd=root, env=env, stdout=subprocess.DEVNULL)
    if not file.exists(): return chosen,{'pytest':'it ended before it could tell what failed'}
    cases = [*ET.parse(file).iter('testcase')]
    told = lambda c: {o.get('name'):o.get('value') for o in c.iter('property')}
    found = {f"{c.get('classname')}::{c.get('name')}":' '.join(o.get('message', '').split())[:200] for c in cases for o in c if o.tag in ('failure','error')}
    return [told(c)['trains'] for c in cases if 'trains' in told(c)],found

def lessons(env, chosen):
    "Notebooks that failed, with the last line of their errors"
    def run(nb): return subprocess.run([Path(sys.executable).parent/'nbdev-test', nb], cwd=root, env=env, capture_output=True, text=True)
    with ThreadPoolExecutor(workers(env)) as pool: done = dict(zip(chosen, pool.map(run, chosen)))
    last = lambda text: next((o for o in reversed(text.splitlines()) if re.match(r'\w*(Error|Exception|Warning)', o)), text[-200:])
    return {str(nb.relative_to(root)):last(o.stderr) for nb,o in done.items() if o.returncode}

def main():
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--times', type=int, default=10)
    parser.add_argument('--numbers', help="Some repetitions instead, such as 2,4")
    parser.add_argument('--only', default='', help="A regular expression for names of tests and notebooks")
    parser.add_argument('--skip', choices=('tests','lessons'), help="What to leave out")
    args,failed,known = parser.parse_args(),{},[]
    numbers = [*map(int, args.numbers.split(','))] if args.numbers else range(args.times)
    books = [o for o in sorted((root/'nbs').rglob('*.ipynb')) if '.ipynb_checkpoints' not in str(o) and teaches(o) and re.search(args.only, o.name)]
    for i in numbers:
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            (folder/'sitecustomize.py').write_text(shifted)
            (folder/'kdfast_notes.py').write_text(notes)
            kept = {k:v for k,v in os.environ.items() if k!='OMP_NUM_THREADS'}
            env,found = {**kept, **settings(i), 'PYTHONPATH':os.pathsep.join([str(folder), os.environ.get('PYTHONPATH', '')]), 'PYTHONWARNINGS':'ignore'},{}
            if args.skip!='tests':
                trains,found = tests(env, known, folder)
                known = known or [o for o in trains if re.search(args.only, o)]
                if not known: sys.exit(f"No test that trains matches {args.only!r}")
            if args.skip!='lessons': found.update(lessons(env, books))
        for name,what in found.items(): failed.setdefault(name, []).append(i)
        told = ' '.join(f'{k}={v}' for k,v in settings(i).items())
        print(f'{told}: {len(known)} tests that train, {len(books)} notebooks, {len(found)} failed', *(f'  {k}: {v}' for k,v in found.items()), sep='\n', flush=True)
    for name,at in sorted(failed.items(), key=lambda o: -len(o[1])): print(f'{len(at)} of {len(numbers)}: {name}, in the repetitions {at}')
    sys.exit(bool(failed))

if __name__=='__main__': main()
