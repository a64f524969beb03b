"From `git clone` to exported students: `python benchmarks/first_run.py > results/first_run.md`"
import os, subprocess, tempfile
from pathlib import Path
from time import perf_counter, time

root = Path(__file__).parent.parent

def timed(*args, **kwargs):
    begin = perf_counter()
    subprocess.run(args, check=True, stdout=subprocess.DEVNULL, **kwargs)
    return perf_counter()-begin

def main():
    with tempfile.TemporaryDirectory() as tmp:
        clone = timed('git', 'clone', '--quiet', root, f'{tmp}/kdfast')
        begin = time()
        demo = timed('make', 'demo', cwd=f'{tmp}/kdfast', env={k:v for k,v in os.environ.items() if k not in ('OMP_NUM_THREADS','PYTHONPATH')})
        install = (Path(tmp)/'kdfast/.venv/installed').stat().st_mtime-begin
        exported = len([*(Path(tmp)/'kdfast/demo').glob('student-*.pkl')])
    print(f"From `git clone` to {exported} exported students, on {os.cpu_count()} cores: {(clone+demo)/60:.1f} minutes, of which installing took {install/60:.1f} and "
        f"the demo {(demo-install)/60:.1f} (`python benchmarks/first_run.py`).")

if __name__=='__main__': main()
