"Several processes on the CPU end with one student"
import os, socket, subprocess, sys, pytest, warm
from pathlib import Path
from fastai.vision.all import *
from kdfast.all import *

pytestmark = pytest.mark.slow
here = Path(__file__).parent

def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

def group_env(n, port, rank): return dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port)) if n>1 else {}

def cold(*args): return [sys.executable, *map(str, args)]

def launch(n, *args, python=warm.command, **extra):
    "Run `args` in `n` processes of one gloo group"
    port = free_port()
    env = lambda rank: {**os.environ, **group_env(n, port, rank), 'OMP_NUM_THREADS':'1', 'PYTHONWARNINGS':'ignore', **extra}
    running = [subprocess.Popen(python(*args), env=env(r), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for r in range(n)]
    try: outs = [p.communicate(timeout=240)[0] for p in running]
    finally:
        for p in running: p.kill()
    assert all(p.returncode==0 for p in running), '\n'.join(outs)
    return outs

def trained(how, n, tmp_path):
    launch(n, here/'worker.py', how, tmp_path/how)
    return [torch.load(f'{tmp_path/how}.{r}', weights_only=True) for r in range(n)]

def learnt(state): return {k:v for k,v in state.items() if 'running' not in k and 'num_batches' not in k}

def far(a, b): return max(((a[k]-b[k]).norm()/b[k].norm().clamp(min=1e-3)).item() for k in a)

def test_both_processes_end_with_the_same_student_and_adapters(tmp_path):
    a,b = trained('synced', 2, tmp_path)
    alone = trained('alone', 2, tmp_path)
    adapters = [k for k in a['after'] if k.startswith('adapters.')]
    assert len(learnt(a['after']))>len(adapters)>5
    for k,v in learnt(a['after']).items(): assert torch.equal(v, b['after'][k]), k
    for k,v in learnt(a['after']).items():
        if not k.endswith('conv.bias'): assert not torch.equal(v, a['before'][k]), k
    assert all(torch.equal(v, b['before'][k]) for k,v in a['before'].items())
    assert far(*(learnt(o['after']) for o in alone))>1e-2
    assert all(far(learnt(a['after']), learnt(o['after']))>1e-2 for o in alone)
    assert a['kept']==b['kept']=='Adapted'
    assert a['history']['kd']==b['history']['kd'] and a['history']['fitnet']==b['history']['fitnet']

def test_a_term_that_was_added_later(tmp_path):
    "Its adapters are there before the model is wrapped"
    a,b = trained('added', 2, tmp_path)
    adapters = [k for k in a['after'] if k.startswith('adapters.')]
    assert adapters and a['kept']==b['kept']=='Adapted' and a['history']['fitnet'][0]>0
    for k,v in learnt(a['after']).items(): assert torch.equal(v, b['after'][k]), k

def test_two_halves_are_the_whole(tmp_path):
    two,_ = trained('norms', 2, tmp_path)
    (tmp_path/'one').mkdir()
    one, = trained('norms', 1, tmp_path/'one')
    assert all(torch.equal(v, two['before'][k]) for k,v in one['before'].items())
    assert far(learnt(one['after']), learnt(one["before"]))>1e-3
    assert far(learnt(two['after']), learnt(one['after']))<1e-4
    for k in ('kd','at','fitnet'): assert two['history'][k]==pytest.approx(one['history'][k], rel=1e-4)

def test_a_plain_learner_in_two_processes(tmp_path):
    "Such as a teacher that is fine-tuned by `vision_learner`"
    a,b = trained('plain', 2, tmp_path)
    for k,v in learnt(a['after']).items(): assert torch.equal(v, b['after'][k]) and not torch.equal(v, a['before'][k]), k

@pytest.mark.parametrize('n', [2,4])
def test_a_cache_is_made_and_read_by_all(n, tmp_path):
    "Each process writes its part of the samples, and finds what any of them has written"
    states = trained('cached', n, tmp_path)
    for o in states[1:]:
        for k,v in learnt(states[0]['after']).items(): assert torch.equal(v, o['after'][k]), k
    assert all(o['history']['kd']==states[0]['history']['kd'] for o in states)
    parts = {o.name for o in (tmp_path/'cached-cache').iterdir()}
    assert 'meta.json' in parts and not [*tmp_path.glob('.*part')]
    logits = np.load(tmp_path/'cached-cache'/'1.npy')
    assert logits.shape==(2,400,10) and (np.abs(logits).sum(-1)>0).all()

def test_the_group_is_gone_before_the_interpreter(tmp_path):
    "A process whose group is not destroyed may abort at its end (pytorch issue 190489)"
    code = "import atexit, torch; atexit.register(lambda: print('alive' if torch.distributed.is_initialized() else 'gone')); " \
        f"import sys; sys.path.insert(0, {str(here)!r}); import worker; worker.main('plain', {str(tmp_path/'plain')!r}); assert torch.distributed.is_initialized()"
    assert [o.split()[-1] for o in launch(2, '-c', code, python=cold)]==['gone','gone']

def test_what_fails_in_one_process_fails_in_all(tmp_path):
    "Instead of waiting for it until the group's time is out"
    with pytest.raises(AssertionError) as e: trained('failing', 2, tmp_path)
    assert 'RuntimeError: a broken teacher' in str(e.value) and 'Process 1 could not make or read the cache (RuntimeError: a broken teacher)' in str(e.value)
    assert not [*tmp_path.glob('*cache')] and not [*tmp_path.glob('.*part')]

def test_what_is_learned_and_remembered_beside_is_one(tmp_path):
    "Peers, a paraphraser, and a memory that knows the images of all processes by their numbers"
    a,b = trained('beside', 2, tmp_path)
    for k,v in learnt(a['after']).items(): assert torch.equal(v, b['after'][k]), k
    prefix = 'adapters.crd_contrast.'
    assert any(k.startswith('adapters.dml_') for k in a['after']) and not torch.equal(a['before'][prefix+'of_student'], a['after'][prefix+'of_student'])
    data = digits_dls(32, per_class=40, seed=1).train_ds
    classes = a['after'][prefix+'classes']
    assert (classes>=0).float().mean()>.9 and all(c in (-1,int(data[i][1])) for i,c in enumerate(classes.tolist()))

@pytest.mark.parametrize('how', ['shared','equal'])
def test_shares_are_one(how, tmp_path):
    "Each process measures its own half of a batch, and all follow the mean"
    a,b = trained(how, 2, tmp_path)
    for k,v in learnt(a['after']).items(): assert torch.equal(v, b['after'][k]), k
    balances = [k for k in a['after'] if k.endswith('balance.log')]
    assert len(balances)==2 and all(a['after'][k]!=0 for k in balances)

def test_two_stages_in_two_processes(tmp_path):
    a,b = trained('two-stages', 2, tmp_path)
    for k,v in learnt(a['after']).items(): assert torch.equal(v, b['after'][k]), k
    assert [o>0 for o in a['history']['fitnet']]==[True,False] and [o>0 for o in a['history']['kd']]==[False,True]

def test_four_processes_end_with_one_student(tmp_path):
    states = trained('synced', 4, tmp_path)
    for o in states[1:]:
        for k,v in learnt(states[0]['after']).items(): assert torch.equal(v, o['after'][k]), k

@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count()<2, reason='needs two GPUs')
def test_sync_batchnorm_on_gpus(tmp_path):
    a,b = trained('gpus', 2, tmp_path)
    assert all(torch.equal(v, b['after'][k]) for k,v in a['after'].items()) and a['sync']==b['sync']>0

@pytest.mark.parametrize('mode', ['stagewise','parallel'])
def test_blocks_in_two_processes(mode, tmp_path):
    a,b = trained(mode, 2, tmp_path)
    for k,v in learnt(a['after']).items(): assert torch.equal(v, b['after'][k]), k
    own = {k:v for k,v in learnt(a['after']).items() if not k.startswith('adapters.')}
    assert all(not torch.equal(v, a['before'][k]) for k,v in own.items())
    stages = ['group1','group2','group3'] if mode=='stagewise' else ['parallel']
    assert a['history']['stage']==[*stages,'classifier'] and a['history']['valid_hint'][:-1]==b['history']['valid_hint'][:-1]
    assert a['kept']==b['kept']=='Adapted'
