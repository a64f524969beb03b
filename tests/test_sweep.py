"Runs, records and sweeps: killed, broken, shared"
import functools, importlib.util, json, multiprocessing, os, resource, shutil, signal, subprocess, sys, time, pytest, torchvision, warm
from conftest import slow_but
from dataclasses import replace
from pathlib import Path
from fastai.vision.all import *
from kdfast.all import *
from kdfast.core import digest
from kdfast.experiments.records import read_results, Records
from kdfast.experiments.checkpoint import EpochCheckpoint
from kdfast.experiments.arm import save_network
from kdfast.experiments.run import Run, do_run
from kdfast.experiments.sweep import Sweep

root,bin = Path(__file__).parent.parent,Path(sys.executable).parent
spec = importlib.util.spec_from_file_location('kills', root/'benchmarks/kills.py')
kills = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kills)

big = Run(student='wrn-10-0.5', epochs=2, pct=.4, size=16)
kd,at = (Run(method=o, teacher=big, epochs=2, pct=.2, bs=32, size=16) for o in ('kd','at'))

def same(a, b): return {k:a[k] for k in ('accuracy','history','weights')}=={k:b[k] for k in ('accuracy','history','weights')}

# --- killed

few = '--rows','16-1 from 16-2','--arms','KD'

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "What a command leaves that nobody kills"
    out = tmp_path_factory.mktemp('whole')
    code,_ = kills.start(out, 'sanity', '', few, warm.command)
    assert code==0 and len(kills.results(out))==3 and len(kills.epochs(out))==6
    return kills.results(out)

@pytest.mark.slow
@pytest.mark.parametrize('at', ['after:2','checkpoint:5','record:2'])
def test_a_killed_command_ends_as_an_uninterrupted_one(whole, at, tmp_path):
    "Half through writing a checkpoint or a record, and in the midst of whatever comes a tenth of a second after the second epoch"
    killed,_,_,trained,wrong = kills.trial(at, tmp_path, 'sanity', few, whole, warm.command)
    assert not wrong and killed and trained in ((5,6) if at=='after:2' else (6,))  # it may die between a checkpoint and telling of it

def test_kills_are_spread_and_a_quarter_of_them_within_a_write():
    at = [*kills.moments(20, 100, 40, 10)]
    assert len({*at})==20 and sum(not o.startswith('time') for o in at)>=5
    times = [float(o[5:]) for o in at if o.startswith('time')]
    assert min(times)<10 and max(times)>90

# --- several processes

@pytest.mark.slow
def test_two_workers_share_one_sweep(tmp_path, capfd, monkeypatch):
    "Each run is told once, by whichever process did it; later workers see the environment of their time"
    runs = [replace(o, seed=s) for s in range(2) for o in (kd,at)]
    sweep = Sweep('shared', runs, tmp_path/'two')
    table = sweep.run(workers=2)
    told = [line.split(':')[0] for line in capfd.readouterr().out.splitlines() if '% in ' in line]
    assert sorted(told)==sorted(f'Teacher {o.student}' if o==big else str(o) for o in sweep.runs) and (table.state=='done').all() and len(table)==7
    alone = Sweep('alone', [kd], tmp_path/'one')
    alone.run()
    assert all(sweep.records.get(o)['images']==alone.records.get(o)['images'] for o in alone.runs)
    half = Run(student='wrn-10-0.5', epochs=1, pct=.1, size=8, bs=32, bf16=True)
    for native,precision in (('0','float32'),('1','bfloat16')):
        monkeypatch.setenv('KDFAST_NATIVE_BF16', native)
        again = Sweep('environment', [half], tmp_path/precision)
        again.run(workers=2)
        assert again.records.get(half)['precision']==precision

@pytest.mark.slow
def test_two_commands_share_one_folder(tmp_path):
    "No run twice, none lost: each is told by one of them alone"
    command = [bin/'kdfast', 'table', 'sanity', '--schedule', 'smoke', '--rows', '16-1 from 16-2', '--arms', 'KD', '--seeds', '2', '--out', tmp_path]
    both = [subprocess.Popen(warm.command(*command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2)]
    outs = [o.communicate(timeout=500)[0] for o in both]
    assert all(o.returncode==0 for o in both), outs
    told = [line.split(':')[0] for out in outs for line in out.splitlines() if ' s' in line and '% in ' in line]
    assert len(told)==5==len({*told})
    assert all('| 16-1 from 16-2 |' in o and 'A smoke test' in o for o in outs)

def _claim(sweep, run, started, go_on):
    with sweep._claimed(run) as mine:
        started.put(mine)
        go_on.wait(60)

@pytest.mark.slow
def test_a_dead_process_holds_nothing(tmp_path):
    sweep,context = Sweep('locks', [kd], tmp_path),multiprocessing.get_context('spawn')
    started,go_on = context.Queue(),context.Event()
    other = context.Process(target=_claim, args=(sweep, big, started, go_on))
    other.start()
    assert started.get(timeout=100)
    with sweep._claimed(big) as mine: assert not mine
    os.kill(other.pid, signal.SIGKILL)
    other.join()
    with sweep._claimed(big) as mine: assert mine

@pytest.mark.slow
def test_a_cluster_of_two_workers(tmp_path):
    distributed = pytest.importorskip('distributed')
    one = Sweep('one machine', [kd,at], tmp_path/'one')
    one.run()
    with distributed.LocalCluster(n_workers=0, dashboard_address=None) as cluster, distributed.Client(cluster) as client:
        started = [subprocess.Popen(warm.command('-m', 'distributed.cli.dask_worker', cluster.scheduler_address, '--nthreads', '1', '--no-nanny', '--no-dashboard'), cwd=tmp_path, stderr=subprocess.DEVNULL) for _ in range(2)]
        client.wait_for_workers(2, timeout=60)
        sweep = Sweep('cluster', [kd,at,replace(kd, method='blocks', epochs=1)], tmp_path/'many')
        with pytest.raises(RuntimeError, match='1 of 6 runs of cluster are not done'): sweep.run(client=client)
        assert [(o.method, 'too few' in e) for o,e in sweep.errors().items()]==[('blocks',True)]
        workers = set(client.run(os.getpid).values())
        client.shutdown()
        for o in started: o.wait(60)
    assert len(workers)==2 and os.getpid() not in workers
    for o in (kd,at,kd.control): assert sweep.records.get(o)['accuracy']==pytest.approx(one.records.get(o)['accuracy'], abs=.03)
    assert all(sweep.file_of(o).exists() for o in (big,kd,at))
    with distributed.LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None) as cluster, distributed.Client(cluster) as client:
        with pytest.raises(ValueError, match='threads_per_worker=1'): Sweep('threads', [kd], tmp_path/'threads').run(client=client)

# --- going on

class Stop(Callback):
    "A power cut in the middle of one epoch of all"
    run_valid = False
    def __init__(self, at): self.at,self.n = at,-1
    def before_train(self): self.n += 1
    def after_batch(self):
        if self.n==self.at: raise KeyboardInterrupt

resnet = Run(student='wrn-10-2', epochs=1, pct=.3, size=16)
kinds = {'fitnet':replace(kd, method='kd+fitnet', epochs=3), 'steps':replace(kd.control, steps=(.3,.6), lr=.05, epochs=3), 'bf16':replace(kd, bf16=True, epochs=3, size=8),
    'late':replace(kd, method='at:since=.5', epochs=3), 'blocks':replace(kd, method='blocks', epochs=6), 'parallel':replace(kd, method='blocks-parallel', epochs=4),
    'labels first':replace(kd, method='blocks-pretrained', epochs=6), 'pruned':Run(student='wrn-10-2', start=resnet, method='kd', teacher=resnet, chain='prune:.5,factorize:.7', epochs=2, pct=.2, size=16),
    'pretrained':Run(student='resnet18', pretrained=True, epochs=2, pct=.05, size=16)}

def imagenet_weights(net, folder, monkeypatch):
    "Where torch.hub keeps what it has downloaded"
    file = folder/'hub/checkpoints'/torchvision.models.ResNet18_Weights.DEFAULT.url.split('/')[-1]
    file.parent.mkdir(parents=True)
    torch.save(net.state_dict(), file)
    monkeypatch.setenv('TORCH_HOME', str(folder))

def done(run, nets, file=None, cbs=None):
    learn,result = do_run(run, checkpoint=file, cbs=cbs, **{k:v for k,v in nets.items() if getattr(run, k)})
    return [p.detach().clone() for p in learn.student.parameters()],{k:result[k] for k in ('accuracy','history','parameters')}

def two_nets():
    set_seed(3)
    return dict(teacher=wrn(10, 2), start=wrn(10, 2))

@functools.cache
def uninterrupted(kind):
    "With checkpoints and without, which is the same"
    with tempfile.TemporaryDirectory() as folder: (weights,result),without = done(kinds[kind], two_nets(), Path(folder)/'whole.pth'),done(kinds[kind], two_nets())
    assert without[1]==result and all(torch.equal(a, b) for a,b in zip(weights, without[0]))
    return weights,result

@pytest.mark.parametrize('kind', slow_but('fitnet', 'bf16', 'blocks', of=kinds))
@pytest.mark.parametrize('at', [1, pytest.param(2, marks=pytest.mark.slow)])
def test_training_goes_on_as_if_nothing_had_happened(kind, at, tmp_path, monkeypatch):
    if kind=='pruned': pytest.importorskip('torch_pruning')
    if kind=='bf16': monkeypatch.setenv('KDFAST_NATIVE_BF16', '1')
    if kind=='pretrained': imagenet_weights(torchvision.models.resnet18(), tmp_path, monkeypatch)
    run,nets,(weights,result) = kinds[kind],two_nets(),uninterrupted(kind)
    with pytest.raises(KeyboardInterrupt): done(run, nets, tmp_path/'cut.pth', Stop(at))
    assert sum(o['epochs'] for o in EpochCheckpoint(tmp_path/'cut.pth', run.key).fits)==at
    resumed,again = done(run, nets, tmp_path/'cut.pth')
    assert again==result and all(torch.equal(a, b) for a,b in zip(weights, resumed))

@pytest.mark.parametrize('chain', [None,'prune:.5'])
def test_bfloat16_that_is_only_emulated_is_float32(chain, native):
    "And the result says which it was; in float32 it is the run without bfloat16"
    def fit(**kwargs):
        run,seen = Run(student='wrn-10-0.5', epochs=1, pct=.1, size=8, bs=32, start=Run(student='wrn-10-0.5', size=8) if chain else None, chain=chain, **kwargs),set()
        class Look(Callback):
            def after_pred(self): seen.add((self.learn.model.fc.weight.dtype,self.learn.pred.dtype))
        set_seed(0)
        net = wrn(10, .5)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter('always')
            learn,result = do_run(run, start=net if chain else None, cbs=Look())
        assert any('float32 is used instead' in str(o.message) for o in said)==(run.bf16 and not native)
        return result,{o for _,o in seen}
    (half,types),(full,_) = fit(bf16=True),fit()
    assert half['precision']==('bfloat16' if native else 'float32') and 'precision' not in full
    assert types=={torch.bfloat16 if native else torch.float32}
    if not native: assert half['history']['train_loss']==pytest.approx(full['history']['train_loss'], rel=1e-4)

@pytest.fixture(scope='module')
def cut(tmp_path_factory):
    "A run, its result, and its checkpoint after the first of two epochs"
    run,file = Run(epochs=2, pct=.2, size=16),tmp_path_factory.mktemp('cut')/'a.pth'
    _,result = do_run(run)
    with pytest.raises(KeyboardInterrupt): do_run(run, checkpoint=file, cbs=Stop(1))
    return run,result,file

@pytest.mark.parametrize('harm', ['half','text','empty','other'])
def test_a_broken_checkpoint_is_made_anew(harm, cut, tmp_path):
    run,result,whole = cut
    file = Path(shutil.copy(whole, tmp_path))
    assert len(EpochCheckpoint(file, run.key).fits)==1
    if harm=='half': file.write_bytes(file.read_bytes()[:file.stat().st_size//2])
    if harm=='text': file.write_text('a letter')
    if harm=='empty': file.write_bytes(b'')
    if harm=='other': do_run(Run(epochs=1, pct=.2, lr=1e-3, size=16), checkpoint=file)
    assert EpochCheckpoint(file, run.key).fits==[]
    assert do_run(run, checkpoint=file)[1]['history']==result['history']

def test_seconds_are_those_of_all_sessions(cut, tmp_path):
    run,_,whole = cut
    file = Path(shutil.copy(whole, tmp_path))
    saved = torch.load(file, weights_only=True)
    torch.save(dict(saved, seconds=1000.), file)
    assert 1000<do_run(run, checkpoint=file)[1]['seconds']<1100

@pytest.mark.parametrize('more', [dict(chain='prune:.5', method='blocks', teacher=big), dict(steps=(.5,), chain='prune:.5'), dict(steps=(.5,), method='fitnet+blocks', teacher=big)])
def test_schedules_that_exclude_each_other(more):
    with pytest.raises(ValueError, match='exclude each other: leave out'): Run(student='wrn-10-1', size=16, **more)
    with pytest.raises(ValueError, match='keeps its layers: leave out start, conv, params, steps, chain'): Run(student='resnet18', pretrained=True, chain='prune:.5')

# --- the store

@contextmanager
def file_size_limited(n):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n,before[1]))
    try: yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)

def test_a_full_disk_leaves_the_store_whole(tmp_path):
    records = Records(tmp_path/'records.jsonl')
    records.add(kd, dict(accuracy=.5, seconds=1.))
    before = records.file.read_bytes()
    with file_size_limited(50_000), pytest.raises(OSError, match='records.jsonl cannot be written, as on a full disk: free some space'):
        records.add(at, dict(accuracy=.6, seconds=1., history=['x'*1000]*100))
    assert (records.get(kd)['accuracy'],records.get(at))==(.5,None) and records.file.read_bytes()==before
    assert records.add(at, dict(accuracy=.6, seconds=1.)) and len(records.table())==2
    assert records.file.read_bytes().startswith(before) and [o.name for o in tmp_path.iterdir() if o.suffix!='.lock']==['records.jsonl']

def test_a_store_that_is_removed_meanwhile(tmp_path):
    records = Records(tmp_path/'records.jsonl')
    records.add(kd, dict(accuracy=.5, seconds=1.))
    kept = records.file.replace(tmp_path/'kept')
    for f in (lambda: records.get(kd), lambda: records.add(at, dict(accuracy=.6, seconds=1.)), records.table):
        with pytest.raises(OSError, match='records.jsonl was removed or replaced while in use, and lacks wrn-10-1 kd .*: restore it, and run again'): f()
    assert not records.file.exists()
    Records(records.file).add(at, dict(accuracy=.6, seconds=1.))
    with pytest.raises(OSError, match='removed or replaced while in use'): records.add(big, dict(accuracy=.7, seconds=1.))
    kept.replace(records.file)
    assert records.get(kd)['accuracy']==.5

@pytest.mark.parametrize('write', [lambda net, file: save_network(net, file), lambda net, file: Learner(digits_dls(), net, path=file.parent).export_student(file.name)])
def test_a_full_disk_is_said_with_the_name_of_the_file(write, tmp_path):
    with file_size_limited(50_000), pytest.raises(OSError, match='net.pkl cannot be written, as on a full disk: free some space'): write(wrn(16, 2), tmp_path/'net.pkl')
    assert not [*tmp_path.iterdir()]

def test_training_that_diverges_is_no_result(tmp_path):
    sweep = Sweep('diverged', [Run(epochs=1, pct=.4, lr=1e20, size=16)], tmp_path)
    with pytest.raises(RuntimeError, match='1 of 1 runs'): sweep.run()
    assert 'diverged to weights that are not finite: lower its lr' in first(sweep.errors().values()) and not sweep.records.results()

@pytest.mark.parametrize('text', [b'SQLite format 3\0\x10\xff', b'{', b'[]', b'5', b'null', b'{"state": "done", "settings": {"student": 5}, "result": {}}', b'{"state": "done", "settings": {}, "result": null}', b'{"state": "fine", "settings": {}, "result": {}}', b'{"state": "done", "settings": {}}', b'{"state": "done", "settings": {"magic": 1}, "result": {}}'])
def test_other_files_are_refused_and_stay(text, tmp_path):
    (file := tmp_path/'records.jsonl').write_bytes(text)
    records = Records(tmp_path/'ours.jsonl')
    records.add(kd, dict(accuracy=.5, seconds=1.))
    for f in (lambda: Records(file), lambda: Sweep('theirs', [kd], tmp_path), lambda: records.take(file)):
        with pytest.raises(ValueError, match='records.jsonl does not hold JSON lines of runs.*' + 'pip install -U kdfast'*(b'magic' in text)): f()
    assert file.read_bytes()==text and {*records.results()}=={kd}

def test_of_two_lines_the_finished_one_counts(tmp_path):
    "As after a merge of two versions of the file, in either order; what failed is taken once"
    failed,done = (Records(tmp_path/f'{o}.jsonl') for o in ('failed','done'))
    failed.add(kd, dict(error='out of memory'), 'failed')
    done.add(kd, dict(accuracy=.5, seconds=1.))
    texts = [o.file.read_text() for o in (failed,done)]
    for i in (1,-1):
        (tmp_path/'both.jsonl').write_text(''.join(texts[::i]))
        both = Records(tmp_path/'both.jsonl')
        assert both.get(kd)['accuracy']==.5 and read_results(both.file)==done.results() and Records(tmp_path/f'{i}.jsonl').take(both.file)==1
        both.add(at, dict(accuracy=.6, seconds=1.))
        assert both.file.read_text().startswith(texts[1]) and both.file.read_text().count('\n')==2
    assert (done.take(failed.file),failed.take(failed.file))==(0,0)

def test_a_linked_file_stays_a_link(tmp_path):
    (tmp_path/'link.jsonl').symlink_to(tmp_path/'records.jsonl')
    Records(tmp_path/'link.jsonl').add(kd, dict(accuracy=.5, seconds=1.))
    assert (tmp_path/'link.jsonl').is_symlink() and Records(tmp_path/'records.jsonl').get(kd)
    with pytest.raises(FileNotFoundError): Records(tmp_path/'new/records.jsonl').take(tmp_path/'nowhere.jsonl')
    assert not (tmp_path/'new').exists()

def test_what_is_read_cannot_change_what_is_written(tmp_path):
    records = Records(tmp_path/'records.jsonl')
    records.add(kd, dict(accuracy=.5, seconds=1., history=dict(accuracy=[.5])))
    line = records.file.read_text()
    records.get(kd)['history']['accuracy'].append(.9)
    records.results()[kd]['accuracy'] = .9
    records.add(at, dict(accuracy=.6, seconds=1.))
    assert records.file.read_text().startswith(line) and records.get(kd)['history']['accuracy']==[.5]

def test_what_another_process_writes_is_seen(tmp_path):
    ours,theirs = (Records(tmp_path/'records.jsonl') for _ in range(2))
    ours.add(kd, dict(error='out of memory'), 'failed')
    assert theirs.get(kd, 'failed') and theirs.get(kd) is None
    theirs.add(kd, dict(accuracy=.5, seconds=1.))
    theirs.add(at, dict(accuracy=.6, seconds=1.))
    assert not ours.add(at, dict(accuracy=.1, seconds=1.)) and {k:o['accuracy'] for k,o in ours.results().items()}=={kd:.5, at:.6}

@pytest.mark.slow
def test_many_processes_write_at_once(tmp_path):
    "No record is lost"
    code = f"import sys; from kdfast.experiments.records import *; from kdfast.experiments.run import Run; r = Records('{tmp_path}/r.jsonl'); " \
        "[r.add(Run(seed=100*int(sys.argv[1])+i), dict(accuracy=i/25, seconds=1.)) for i in range(25)]"
    many = [subprocess.Popen(warm.command('-W', 'ignore', '-c', code, i)) for i in range(3)]
    assert [o.wait(200) for o in many]==[0]*3
    assert {o.seed for o in Records(tmp_path/'r.jsonl').results()}=={100*i+j for i in range(3) for j in range(25)}

# --- teachers

def test_a_lost_teacher_is_trained_again_and_only_where_it_is_needed(tmp_path):
    sweep = Sweep('teachers', [kd], tmp_path)
    sweep.run()
    before = {o.key:sweep.records.get(o) for o in sweep.runs}
    sweep.file_of(big).unlink()
    sweep.run()
    assert not sweep.file_of(big).exists()
    more = Sweep('teachers', [kd,at], tmp_path)
    more.run()
    assert same(more.records.get(big), before[big.key]) and more.records.get(big)['finished']>before[big.key]['finished']
    assert more.records.get(kd)==before[kd.key] and more.records.get(at)['teacher weights']==before[big.key]['weights']

def test_other_classes_and_other_images(tmp_path):
    with pytest.raises(ValueError, match='learned the classes of cifar10, not those of digits'): Run(method='kd', teacher=Run(data='cifar10'))
    sweep = Sweep('classes', [kd], tmp_path)
    sweep._attempt(big)
    file = sweep.file_of(big)
    saved = torch.load(file, weights_only=True)
    torch.save(dict(saved, vocab=[*'abcdefghij']), file)
    with pytest.raises(RuntimeError): sweep.run()
    assert "was trained on the classes ['a', 'b'" in sweep.errors()[kd]
    sweep.records.add(at, dict(accuracy=.5, seconds=1., images=dict(training=5, validation=7, first='0')))
    with pytest.raises(ValueError, match='holds results of other images of digits'): Sweep('images', [replace(kd, seed=5)], tmp_path).run()

def test_a_teacher_that_cannot_be_made_again_ends_the_sweep(tmp_path, monkeypatch):
    "It is on record, its network is lost, and it fails: once, not for ever"
    Sweep('teachers', [kd], tmp_path).run()
    sweep = Sweep('teachers', [kd,at], tmp_path)
    sweep.file_of(big).unlink()
    calls = []
    def broken(run, *args, **kwargs):
        calls.append(run)
        raise RuntimeError('CUDA out of memory')
    monkeypatch.setattr('kdfast.experiments.sweep.do_run', broken)
    with pytest.raises(RuntimeError, match='2 of 4 runs of teachers are not done'): sweep.run()
    assert calls==[big] and 'CUDA out of memory' in sweep.errors()[big] and sweep.records.get(big)

def test_callbacks_with_a_state_of_their_own_are_refused(tmp_path):
    run,file = Run(epochs=2, pct=.2, size=16),tmp_path/'a.pth'
    watch = SaveModelCallback(monitor='accuracy', fname='best')
    with pytest.raises(KeyboardInterrupt): do_run(run, checkpoint=file, cbs=Stop(1))
    with pytest.raises(ValueError, match='SaveModelCallback keeps state that is not saved'): do_run(run, checkpoint=file, cbs=watch)

def test_what_failed_is_tried_again_on_demand(tmp_path, monkeypatch):
    sweep,calls = Sweep('retry', [kd], tmp_path),[]
    def broken(run, *args, **kwargs):
        calls.append(run)
        raise RuntimeError('CUDA out of memory')
    monkeypatch.setattr('kdfast.experiments.sweep.do_run', broken)
    with pytest.raises(RuntimeError, match='3 of 3 runs of retry are not done'): sweep.run()
    with pytest.raises(RuntimeError): sweep.run()
    assert [*map(str, calls)]==[str(big), str(kd.control)] and 'CUDA out of memory' in sweep.errors()[big]
    monkeypatch.undo()
    time.sleep(1.1)
    assert len(sweep.run(retry=True))==3 and not sweep.errors()

@pytest.mark.slow
def test_a_folder_in_the_layout_of_imagenet(tmp_path):
    images,labels = (t.tfms.fs[0] for t in digits_dls().valid_ds.tls)
    for part,n in (('train',12),('val',4)):
        for digit in '38':
            (tmp_path/part/f'n0{digit}').mkdir(parents=True)
            for i in [i for i,o in enumerate(labels.labels) if o==digit][:n]: Image.fromarray(images.images[i].permute(1,2,0).numpy()).save(tmp_path/f'{part}/n0{digit}/{i}.JPEG')
    short = dict(data='imagenet', size=32, bs=4, epochs=1)
    sweep = Sweep('imagenet', [Run(**short, student='resnet10', method='at', teacher=Run(**short, student='resnet14'))], tmp_path/'out', tmp_path)
    assert (sweep.run().top5==1).all() and sweep.records.get(sweep.runs[0])['images']['training']==24

@pytest.mark.slow
def test_two_processes_train_one_network(tmp_path):
    "As `accelerate launch` would start them"
    from test_processes import launch
    outs = launch(2, Path(__file__).parent/'together.py', tmp_path)
    results = Records(tmp_path/'records.jsonl').results()
    assert len(results)==3 and all(o['processes']==2 for o in results.values())
    assert sum(o.count('% in ') for o in outs)==3 and not [*(tmp_path/'.checkpoints').iterdir()]
    assert not any('% in ' in o for o in launch(2, Path(__file__).parent/'together.py', tmp_path))

@pytest.mark.slow
def test_a_terminal_shows_a_bar_in_a_bar(tmp_path):
    pty = pytest.importorskip('pty')
    ours,theirs = pty.openpty()
    code = f"from kdfast.experiments.all import *; s = Sweep('bars', [Run(method='kd', teacher=Run(student='wrn-10-2', epochs=1, pct=.3, size=16), epochs=2, pct=.2, bs=32, size=16)], '{tmp_path}'); s._attempt(s.runs[0]); s.run(); s.run()"
    p = subprocess.Popen(warm.command('-W', 'ignore', '-c', code), stdout=theirs, stderr=subprocess.DEVNULL)
    os.close(theirs)
    shown = b''
    try:
        while chunk := os.read(ours, 4096): shown += chunk
    except OSError: pass  # the other end is closed
    shown = shown.decode()
    assert p.wait(timeout=60)==0 and '3/3' in shown and '[14/14' in shown and shown.count('% in ')==3

@pytest.mark.slow
def test_a_damaged_teacher_teaches_nobody(tmp_path, capsys):
    "One bit of its file is enough: it is kept beside, and trained again"
    sweep = Sweep('flip', [kd], tmp_path)
    sweep.run()
    file,sound = sweep.file_of(big),sweep.file_of(big).read_bytes()
    saved = torch.load(file, weights_only=True)
    saved['weights']['fc.weight'][0,0] += 1e-3
    torch.save(saved, file)
    flipped = file.read_bytes()
    for i,damaged in enumerate((flipped,sound[:1000],b'')):
        file.write_bytes(damaged)
        with pytest.raises(ValueError): sweep.network(big)
        more = Sweep('flip', [kd,replace(kd, seed=i+1)], tmp_path)
        assert len(more.run())==5
        taught = more.records.get(more.runs[-1])
        assert taught['teacher weights']==sweep.records.get(big)['weights']==digest(more.network(big))
        assert file.with_name(f'{file.name}.damaged').read_bytes()==damaged and f'{file.name}.damaged' in capsys.readouterr().out

def alive(group): return subprocess.run(['pgrep','-g',str(group)], capture_output=True, text=True).stdout.split()

@pytest.mark.slow
@pytest.mark.parametrize('how', ['SIGTERM','SIGHUP','SIGKILL'])
def test_workers_end_with_their_command(how, tmp_path):
    "What a scheduler sends, and a closed terminal, are answered as Ctrl-C; whatever ends it, nothing goes on behind it"
    command = [str(bin/'kdfast'), *'table sanity --schedule smoke --workers 2 --out'.split(), str(tmp_path)]
    heed = lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)
    p = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=heed)
    for _ in range(600):
        if [*(tmp_path/'.checkpoints').glob('*.pth')]: break
        time.sleep(.1)
    assert len(alive(p.pid))>=3
    p.send_signal(getattr(signal, how))
    err = p.communicate(timeout=60)[1]
    for _ in range(100):
        if not alive(p.pid): break
        time.sleep(.1)
    assert not alive(p.pid)
    if how!='SIGKILL': assert p.returncode==130 and 'Interrupted' in err and 'resumes after the last whole epoch' in err and 'Traceback' not in err

def test_a_remade_network_is_there_before_its_record(tmp_path, monkeypatch):
    "A command that is killed in between makes it again"
    sweep = Sweep('killed', [replace(kd, method='simkd', epochs=1)], tmp_path, exports=True)
    def kill(self, run, *args):
        if run.remade:
            assert self.file_of(run).exists()
            raise KeyboardInterrupt
        return keep(self, run, *args)
    keep = Sweep._keep
    monkeypatch.setattr(Sweep, '_keep', kill)
    with pytest.raises(KeyboardInterrupt): sweep.run()
    assert sweep.records.get(sweep.runs[-1]) is None

def test_what_is_left_is_told_from_runs_like_it(tmp_path):
    "Fifty images ten times over are 500, and a student is not as slow as its teacher"
    few = Run(student='wrn-10-1', bs=25, per_class=5, repeat=10, method='kd', teacher=Run(student='wrn-16-2', epochs=8))
    sweep = Sweep('told', [replace(few, seed=s) for s in range(2)], tmp_path)
    teacher,control,*rest = sweep.runs
    sweep.records.add(teacher, dict(accuracy=.9, seconds=8*1198*.01))
    assert sweep._left()==f"; 4 of 5 left, about {4*12*500*.01/60:.0f} min"
    sweep.records.add(control, dict(accuracy=.9, seconds=12*500*.001))
    assert sweep._left()==f"; 3 of 5 left, about {3*12*500*.001:.0f} s"
