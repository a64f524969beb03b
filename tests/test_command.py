"`kdfast distill`, as a process and in this one"
import itertools, json, os, signal, subprocess, sys, tarfile, time, pytest, torchvision, warm
from conftest import slow_but
from contextlib import suppress
from test_processes import launch
from fastai.vision.all import *
from kdfast.all import *
from kdfast.core import digest
from kdfast.cli import _stem, main
from kdfast.experiments.arm import load_network, save_network
from kdfast.experiments.records import read_results, Records
from kdfast.experiments.results import arms_of, by_arm, label_of, result_table, teachers_of
from kdfast.experiments.run import Run
from kdfast.experiments.spec import methods

kdfast_command = str(Path(sys.executable).parent/'kdfast')
small = '--pct .2 --size 16 --teacher wrn-10-2 --student wrn-10-1 --method kd,kd+at --epochs 2 --teacher-epochs 1 --seeds 2'.split()

def run(*args, env=None, **kwargs):
    return subprocess.run(warm.command(kdfast_command, *args), capture_output=True, text=True, timeout=200, env={**os.environ, **(env or {})}, **kwargs)

def cpu_seconds():
    "Of processes that have ended: unlike time on the wall, the same when the machine has other work"
    t = os.times()
    return t.children_user+t.children_system

@pytest.fixture(scope='module')
def done(tmp_path_factory):
    "A finished run on digits: its output and its folder"
    out,start = tmp_path_factory.mktemp('runs')/'out',cpu_seconds()
    res = subprocess.run([kdfast_command, 'distill', *small, '--out', out], capture_output=True, text=True, timeout=200, env=dict(os.environ, OMP_WAIT_POLICY='PASSIVE'))
    assert res.returncode==0, res.stderr
    assert cpu_seconds()-start<60
    return res.stdout,out

def results_of(out): return read_results(out/'records.jsonl')

def arms(results): return [(label_of(r), r.seed) for r in arms_of(results)]

def teacher_of_all(results):
    "The run and the result of the one teacher"
    (run,result), = teachers_of(results).items()
    return run,result

def weights_of_teacher(out):
    file, = (out/'teachers').iterdir()
    return file

@pytest.mark.slow
def test_distill_writes_what_it_says(done):
    stdout,out = done
    exported = {f'student-{o}.pkl' for o in ('control','kd','kd+at')}
    shown = {'records.jsonl','curves.png',*exported}
    assert {o.name for o in out.iterdir() if o.name[0]!='.'}=={'teachers','students',*shown}
    assert all(str(out/o) in stdout for o in shown)
    results,table = results_of(out),Records(out/'records.jsonl').table()
    assert arms(results)==[(a,s) for s in range(2) for a in ('control','kd','kd+at')]
    assert [*table.accuracy]==[o['accuracy'] for o in results.values()] and len(table)==7
    (run,teacher),ours = teacher_of_all(results),arms_of(results).values()
    assert all(len(o['history']['accuracy'])==2 for o in ours)
    assert [list(o['history'])[4:] for o in [*ours][:3]]==[[],['kd'],['kd','at']]
    assert {o['images']['training'] for o in ours}=={240} and teacher['images']['training']==1198
    assert {o['parameters'] for o in ours}=={count_params(wrn(10, 1))} and teacher['MACs']==count_macs(wrn(10, 2), 16)
    assert all(o['ms per image']>0 and o['command'].startswith('kdfast distill --size 16 --pct 0.2') for o in results.values())
    assert all(o in stdout for o in ('accuracy','parameters','MACs','ms per image','seconds a run'))
    assert '\x1b' not in stdout and '\r' not in stdout
    assert 'kd+at from wrn-10-2, seed 1, epoch 2 of 2: train_loss' in stdout
    assert Image.open(out/'curves.png').size[0]>500

@pytest.mark.slow
def test_a_terminal_shows_bars(tmp_path):
    pty = pytest.importorskip('pty')
    ours,theirs = pty.openpty()
    p = subprocess.Popen(warm.command(kdfast_command, 'distill', *small[:-2], '--out', tmp_path/'out'), stdout=theirs, stderr=subprocess.DEVNULL)
    os.close(theirs)
    chunks = []
    with suppress(OSError):  # the other end is closed
        while chunk := os.read(ours, 4096): chunks.append(chunk)
    shown = b''.join(chunks).decode()
    assert p.wait(timeout=60)==0
    assert 'kd+at from wrn-10-2, seed 0' in shown and '█' in shown and '\r' in shown and 'epoch 1 of' not in shown

@pytest.mark.slow
def test_exported_student_predicts(done):
    learn = load_learner(done[1]/'student-kd.pkl')
    acc = by_arm(results_of(done[1]), 'accuracy')['kd'][0]
    dls = digits_dls(size=16)
    assert Learner(dls, learn.model, metrics=accuracy).validate()[1]==pytest.approx(acc, abs=1e-6)
    assert not any(isinstance(cb, (TeacherCallback,DistillCallback)) for cb in learn.cbs)

@pytest.mark.slow
def test_the_teacher_on_file_is_the_one_that_taught(done):
    net,results = wrn(10, 2),results_of(done[1])
    assert load_network(net, weights_of_teacher(done[1]))['network']=='wrn-10-2'
    assert Learner(digits_dls(size=16), net, metrics=accuracy).validate()[1]==pytest.approx(teacher_of_all(results)[1]['accuracy'], abs=1e-6)
    dls = digits_dls(64, pct=.2, size=16)
    set_seed(1)
    dls.train.rng.seed(1)
    learn = distill_learner(dls, net, partial(wrn, 10, 1), metrics=accuracy)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(2, 3e-3)
    assert learn.recorder.history.to_dict('list')['kd']==pytest.approx(by_arm(results, 'history')['kd'][1]['kd'], rel=1e-4)

@pytest.mark.slow
def test_the_same_command_goes_on(done, tmp_path, capsys):
    out = shutil.copytree(done[1], tmp_path/'out')
    before = results_of(out)
    main(['distill', *small, '--out', str(out)])
    assert 'train_loss' not in capsys.readouterr().out and results_of(out)==before
    main(['distill', *small[:-4], '--teacher-epochs', '1', '--seeds', '3', '--out', str(out)])
    after = results_of(out)
    timed = lambda results: {r:{k:v for k,v in o.items() if k!='ms per image'} for r,o in results.items() if r in before}
    assert timed(after)==timed(before) and arms(after)[6:]==[(a,2) for a in ('control','kd','kd+at')]

@pytest.mark.slow
def test_an_interrupted_demo_goes_on(tmp_path, monkeypatch, capsys, recwarn):
    "Stopped in the second epoch of its first student, it neither trains the teacher nor the first epoch again; of weights that are too large it says nothing"
    monkeypatch.setattr(TeacherCallback, 'every', 4)
    args,seen = ['demo','--epochs','2','--teacher-epochs','1','--seeds','1','--out',str(tmp_path/'demo')],[]
    monkeypatch.setattr('kdfast.cli.demo_arms', ('control','at'))
    class Watch(Callback):
        run_valid,stop = False,True
        def after_batch(self):
            seen.append((len(self.dls.train_ds), self.epoch))
            if self.stop and seen[-1]==(500,1): raise KeyboardInterrupt
    monkeypatch.setattr('kdfast.experiments.sweep._watched', lambda sweep: lambda run=None: [Watch()])
    with pytest.raises(SystemExit) as e: main(args)
    err = capsys.readouterr().err
    assert e.value.code==130 and 'Interrupted' in err and 'resumes after the last whole epoch' in err
    Watch.stop = False
    seen.clear()
    main(args)
    assert {o for o in seen if o[0]==1198}==set() and seen[0]==(500,1)
    assert not any('of the gradient' in str(o.message) for o in recwarn)
    assert len(arms(results_of(tmp_path/'demo')))==2

@pytest.mark.slow
def test_ctrl_c_keeps_what_was_reached(tmp_path):
    args = [kdfast_command, 'distill', *small[:-2], '--seeds', '1', '--out', str(tmp_path/'out')]
    args[args.index('--epochs')+1] = '6'
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a parent in the background may have it ignored
    p = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, 'PYTHONUNBUFFERED':'1'}, preexec_fn=heed)
    for line in p.stdout:
        if line.startswith('wrn-10-1 kd from wrn-10-2, seed 0, epoch 2'): break
    p.send_signal(signal.SIGINT)
    out,err = p.communicate(timeout=60)
    assert p.returncode==130 and 'Traceback' not in err
    assert 'Sweep distill: 2 of 4 runs done' in err and 'The same command' in err and 'resumes after the last whole epoch' in err
    before = results_of(tmp_path/'out')
    assert arms(before)==[('control',0),('control',0)]  # the first is the teacher, which nobody on record needs yet
    res = subprocess.run(warm.command(*args), capture_output=True, text=True, timeout=120)
    assert res.returncode==0 and 'control, seed 0, epoch' not in res.stdout and 'kd from wrn-10-2, seed 0, epoch 1' not in res.stdout
    results = results_of(tmp_path/'out')
    assert arms(results)==[('control',0),('kd',0),('kd+at',0)] and not [*(tmp_path/'out/.checkpoints').iterdir()]
    main([*args[1:-1], str(tmp_path/'straight')])
    assert by_arm(results_of(tmp_path/'straight'), 'history')==by_arm(results, 'history')

@pytest.mark.slow
def test_a_convolution_and_a_budget(done, tmp_path):
    "The student that is trained is of the kind, the budget and the weight decay asked for"
    args = '--pct .2 --size 16 --teacher wrn-10-2 --student wrn-10-2 --method kd --epochs 1 --conv separablehashed --params 30000 --teacher-file'.split()+[str(weights_of_teacher(done[1]))]
    main(['distill', *args, '--wd', '.2', '--out', str(tmp_path/'plain')])
    main(['distill', *args, '--wd', '.2', '--wd-groups', '--out', str(tmp_path/'groups')])
    plain,groups = (first(arms_of(results_of(tmp_path/o)).values()) for o in ('plain','groups'))
    assert 29_900<groups['parameters']<=30_000 and 0<groups['setting']['ratio']<1
    assert '--conv separablehashed --params 30000' in groups['command'] and '--wd 0.2 --wd-groups' in groups['command']
    net = load_learner(tmp_path/'groups/student-kd.pkl').model
    assert count_params(net)==groups['parameters'] and isinstance(net.group1[0].conv1, SeparableHashed)
    assert plain['setting']==groups['setting'] and plain['history']['train_loss']!=groups['history']['train_loss']

def exit_of(capsys, *args):
    "Code, output and error output of the command in this process"
    with pytest.raises(SystemExit) as e: main([*args])
    return e.value.code,*capsys.readouterr()

def test_help_and_unknown_options(capsys):
    for sub,options in dict(demo=['--seeds'], distill=['--teacher-file','--pretrained','--method']).items():
        code,out,_ = exit_of(capsys, sub, '--help')
        assert code==0 and all(o in out for o in options)
    assert '--teacher-file' not in exit_of(capsys, 'demo', '--help')[1]
    for args in (['--magic','3'], ['--seed','2']):
        code,_,err = exit_of(capsys, 'distill', *args)
        assert code==2 and args[0] in err
    assert exit_of(capsys, '--help')[1].count('demo')>0

bad = {
    'method': (['--method','magic'], 'choose from control, kd, at, fitnet'),
    'method twice': (['--method','kd+kd'], 'names a method twice'),
    'second method': (['--method','kd,at+magic'], 'Unknown method magic'),
    'student': (['--student','tiny'], "Unknown network 'tiny': choose from resnet10, resnet14"),
    'teacher': (['--teacher','resnet11'], "Unknown network 'resnet11'"),
    'depth': (['--teacher','wrn-17-1'], 'depth of a WRN must be 6n+4'),
    'data': (['--data','mnist'], 'choose from digits, cifar10, cifar100, imagenette'),
    'path of digits': (['--path','x'], 'digits has no path'),
    'folder': (['--data','imagenette','--path','/nowhere'], "No such file or directory: '/nowhere'"),
    'teacher file': (['--teacher-file','/nowhere.pth'], "No such file or directory: '/nowhere.pth'"),
    'size': (['--data','imagenette','--size','0'], '--size must be at least 1'),
    'lr': (['--lr','nan'], 'lr must be a number, got nan'),
    'no width': (['--student','wrn-16'], "Unknown network 'wrn-16'"),
    'too much': (['--student','wrn-10-1-5'], "Unknown network 'wrn-10-1-5'"),
    'no resnet': (['--student','resnet10.5'], "Unknown network 'resnet10.5'"),
    'files of digits': (['--from-files'], 'leave --from-files out'),
    'too small images': (['--student','alexnet'], 'on images of 32x32: '),
    'no body': (['--student','vit_b_16'], 'cannot be trained on images of'),
    'no sizes': (['--student','torchvision.squeezenet1_0','--method','reviewkd'], 'reviewkd cannot compare'),
    'two teachers': (['--teacher-file','a.pth','--pretrained'], 'leave one out'),
    'pretrained wrn': (['--pretrained'], "Unknown network 'wrn-16-2': choose from torchvision's"),
    'pct': (['--pct','2'], 'in (0,1]'),
    'epochs': (['--epochs','0'], 'at least 1'),
    'no value': (['--conv','grouped:groups='], "groups= is not a number"),
    'no weight': (['--method','at:weight=None'], 'at takes a finite number as weight, got None'),
    'infinite': (['--method','kd,at:weight=1e400'], 'at takes a finite number as weight, got inf'),
    'hot': (['--method','kd:T=1e400'], 'kd takes a finite number as T, got inf'),
    'no temperature': (['--method','kd:T=True'], 'kd takes a finite number as T, got True'),
    'no part': (['--method','kd:since=None'], 'kd takes a finite number as since, got None'),
    'no channels': (['--student','wrn-10-0'], "Unknown network 'wrn-10-0'"),
    'no number': (['--conv','grouped:groups=four'], "groups=four is not a number"),
    'groups': (['--conv','grouped:groups=5'], 'groups=5 does not divide 16 channels in and 16 out'),
    'no budget': (['--params','0'], '--params must be at least 1'),
    'low budget': (['--params','300'], 'The budget of 300 is out of reach'),
    'low ratio': (['--conv','hashed','--params','1000'], 'The budget of 1,000 is out of reach'),
    'empty': (['--conv',''], '--conv is empty: give it a value'),
    'two budgets': (['--ms','5','--params','10000'], '--ms and --params are both budgets'),
    'no time': (['--ms','0'], '--ms must be above 0, got 0'),
    'nan': (['--ms','nan'], '--ms must be above 0, got nan'),
    'no milliseconds': (['--on','ssh pi'], 'pass --ms as well'),
    'another form': (['--ms','5','--runtime','tflite'], '.tflite'),
    'an odd option': (['--ms','5','--runtime','onnx:cores=2'], 'The runtime onnx has no cores'),
    'no threads': (['--ms','5','--runtime','onnx:threads=0'], 'threads must be at least 1'),
    'int8 of what': (['--ms','5','--runtime','onnx:int8=4'], 'write onnx:int8'),
    'a ratio': (['--ms','5','--conv','hashed'], 'not by the ratio of its convolutions'),
    'no width': (['--ms','5','--student','resnet18','--conv','grouped:groups=4'], 'choose a wrn, mobile, a resnet without groups'),
    'too fast': (['--ms','1e-6'], 'out of reach'),
    'another student': (['--ms','5','--student','timm:resnet10t'], 'choose a wrn, mobile, a resnet without groups'),
    'no machine': (['--ms','5','--on','false'], "could not be timed by 'false'"),
    'empty method': (['--method',''], '--method is empty'),
    'endless seeds': (['--seeds','1'+'0'*20], '--seeds must be at least 1 and at most 1e9'),
    'huge batch': (['--bs','1'+'0'*20], '--bs must be at least 1 and at most 1e9'),
    'minus signs': (['--method',f"kd:T={'-'*100_000}1"], 'is not a number: write it as name=number'),
    'negative decay': (['--wd','-1'], '--wd must be at least 0'),
    'no decay': (['--conv','separable','--wd','0','--wd-groups'], 'The weight decay is 0'),
    'nothing to scale': (['--wd-groups'], 'No layer of this network is compressed'),
    'out': (['--out','/proc/nothing/here'], '/proc/nothing'),
    'out is a file': (['--out',__file__], 'test_command.py is a file, so records.jsonl cannot be written below it')}

@pytest.mark.parametrize('case', slow_but(*{*bad}-{'too fast','no machine'}, of=bad))
def test_bad_arguments(case, tmp_path, monkeypatch):
    "Each is found before anything is trained"
    args,message = bad[case]
    monkeypatch.setattr(Learner, 'fit', lambda *args, **kwargs: pytest.fail('trained'))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e: main(['distill', *args])
    assert str(e.value).startswith('kdfast: ') and message in str(e.value)
    assert not [*tmp_path.iterdir()]

@pytest.mark.slow
def test_a_budget_of_milliseconds(tmp_path, monkeypatch, capsys):
    "Is met before training, by a width that is kept when the command is resumed"
    asked = []
    monkeypatch.setattr(Runtime, '__call__', lambda self,net,size: asked.append((count_params(net),size,self.threads)) or count_params(net)/1e4)
    monkeypatch.setattr(Runtime, 'of_file', lambda self,file: 3.21 if file.suffix=='.onnx' and file.exists() else None)
    command = f'distill --pct .2 --size 16 --teacher wrn-10-2 --student wrn-10-1 --method kd --epochs 1 --ms 2 --runtime onnx:threads=2 --out {tmp_path}/out'.split()
    main(command)
    ours = [o['parameters'] for o in arms_of(results_of(tmp_path/'out')).values()]
    assert len({*ours})==1 and 16_000<ours[0]<=20_000 and max(n for n,*_ in asked)<50_000 and {tuple(o[1:]) for o in asked}=={((3,16,16),2)}
    assert len({n for n,*_ in asked})==len(asked)
    told = capsys.readouterr().out
    assert f'student-kd.onnx: 3.21 ms, {ours[0]/1e4:.2f} predicted, --params {ours[0]}' in told
    n = len(asked)
    main(command)
    assert len(asked)==n and len(results_of(tmp_path/'out'))==3
    main([o if o!='2' else '3' for o in command])
    assert len(asked)>n and len(results_of(tmp_path/'out'))==5
    n = len(asked)
    main(command)
    assert len(asked)==n
    (tmp_path/'out/latency.txt').write_text('{"params":')
    main(command)
    assert len(asked)>n and len(results_of(tmp_path/'out'))==5

@pytest.mark.parametrize('command', ['demo','distill','compress','table sanity --schedule smoke'])
def test_a_place_that_may_not_be_written(command, tmp_path, monkeypatch):
    "Named, with the way out, before anything is trained"
    monkeypatch.setattr(Learner, 'fit', lambda *args, **kwargs: pytest.fail('trained'))
    monkeypatch.setattr('kdfast.cli.rehearse', noop)
    mkdir = Path.mkdir
    def denied(self, *args, **kwargs):
        if self==tmp_path/'out': raise PermissionError(13, 'Permission denied', str(self))
        mkdir(self, *args, **kwargs)
    monkeypatch.setattr(Path, 'mkdir', denied)
    with pytest.raises(SystemExit, match=f'^kdfast: {tmp_path}/out cannot be read or written: choose another path'): main([*command.split(), '--out', f'{tmp_path}/out'])

@pytest.mark.parametrize('name', ['SIGTERM','SIGHUP','SIGINT'])
@pytest.mark.parametrize('command', ['demo','distill','compress','table'])
def test_a_scheduler_is_answered_as_ctrl_c(command, name, monkeypatch, capsys):
    "By every command, whatever it is at"
    import kdfast.cli as cli
    def told(**kwargs): os.kill(os.getpid(), getattr(signal, name)) or time.sleep(5)
    monkeypatch.setitem(cli._commands, command, told)
    monkeypatch.setattr(cli, '_parser', lambda commands: SimpleNamespace(parse_args=lambda argv: SimpleNamespace(command=argv[0])))
    before = {o:signal.getsignal(getattr(signal, o)) for o in ('SIGTERM','SIGHUP','SIGINT')}
    for o in before: signal.signal(getattr(signal, o), signal.default_int_handler if o=='SIGINT' else signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit) as e: main([command])
    finally:
        for k,o in before.items(): signal.signal(getattr(signal, k), o)
    assert e.value.code==130 and 'Interrupted. The same command resumes' in capsys.readouterr().err

bad_tables = {'--rows nothing':"Unknown row 'nothing'", '--schedule later':"Unknown schedule 'later'", '--workers 0':'--workers must be at least 1', '--data nowhere --schedule cpu':"No such file or directory: 'nowhere'",
    '--schedule smoke --cluster 127.0.0.1:1':'Timed out trying to connect to tcp://127.0.0.1:1'}

@pytest.mark.parametrize('options', [*bad_tables, '--arms', '--cluster'])
def test_bad_tables(options, tmp_path, monkeypatch):
    "Each is found before there is a folder"
    _,dask = map(pytest.importorskip, ('distributed','dask'))
    monkeypatch.chdir(tmp_path)
    args,message = (options.split(),bad_tables[options]) if options in bad_tables else ([options,''],f'{options} is empty')
    with dask.config.set({'distributed.comm.timeouts.connect':'1s'}), pytest.raises(SystemExit, match=message): main(['table','sanity',*args])
    assert not [*tmp_path.iterdir()]

def test_a_long_method_has_a_short_name():
    "Whose end tells it from others that begin as it does"
    long = '+'.join(f'{o}:weight=500.123456789:since=.123456789:until=.987654321' for o in ('at','fitnet','sp','rkd','nst'))
    runs = [Run(method=f'{long}+{o}', teacher=Run()) for o in ('cc','pkt')]
    assert len(long)>266 and all(len(_stem(o))<130 for o in runs) and len({*map(_stem, runs)})==2

def fails(message, *args):
    with pytest.raises(SystemExit) as e: main(['distill', *map(str, args)])
    assert str(e.value).startswith('kdfast: ') and message in str(e.value), e.value

def test_data_folders(tmp_path):
    (tmp_path/'data/train/cat').mkdir(parents=True)
    fails('must hold the folders train and val', '--data', 'imagenette', '--path', tmp_path/'data', '--out', tmp_path/'out')
    fails('must hold the folders train and test', '--data', 'cifar10', '--path', tmp_path/'data', '--out', tmp_path/'out')

def test_teacher_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_network(wrn(10, 2), tmp_path/'other.pth', network='wrn-10-2', vocab=[*'0123456789'])
    save_network(wrn(16, 2), tmp_path/'classes.pth', network='wrn-16-2', vocab=[*'abcdefghij'])
    save_network(wrn(16, 2, n_out=5), tmp_path/'few.pth', network='wrn-16-2')
    torch.save(wrn(10, 2).state_dict(), tmp_path/'state.pth')
    torch.save([1,2], tmp_path/'list.pth')
    torch.save(dict(weights=3), tmp_path/'odd.pth')
    (tmp_path/'garbage.pth').write_bytes(b'no weights')
    learn = distill_learner(tensor_dls(*[(torch.zeros(4,3,32,32, dtype=torch.uint8), [*'abab'])]*2, bs=2), None, partial(wrn, 10, 1), path=tmp_path)
    learn.export('learner.pkl')
    for file,message in {'other.pth':'holds wrn-10-2, which differs in', 'classes.pth':"trained on the classes ['a', 'b'", 'few.pth':'differs in fc', 'state.pth':'holds another network',
        'list.pth':'contains a list, not weights', 'odd.pth':'contains a dict, not weights', 'garbage.pth':'cannot be read as weights', 'learner.pkl':"classes ['a', 'b'] must be"}.items():
        fails(message, '--teacher-file', file)
    assert not (tmp_path/'distill').exists()

@pytest.mark.slow
def test_a_learner_or_weights_from_file_teach(done, tmp_path):
    learn = distill_learner(digits_dls(size=16), None, partial(wrn, 10, 2), path=tmp_path)
    load_network(learn.model, weights_of_teacher(done[1]))
    learn.export('learner.pkl')
    learn.create_opt()
    learn.save(tmp_path/'saved', with_opt=False)
    learn.save(tmp_path/'both')
    fails('with_opt=False', '--teacher-file', tmp_path/'both.pth', '--out', tmp_path/'out')
    torch.save({'state_dict': {f'module.{k}':v for k,v in learn.model.state_dict().items()}}, tmp_path/'state.pth')
    runs = {}
    for file in ('learner.pkl','state.pth','saved.pth'):
        main(['distill', *'--pct .2 --size 16 --teacher wrn-10-2 --student wrn-10-1 --method kd --epochs 2 --out'.split(), str(tmp_path/file[:5]), '--teacher-file', str(tmp_path/file)])
        results = results_of(tmp_path/file[:5])
        runs[file],(teacher,told) = [o['accuracy'] for o in arms_of(results).values()],teacher_of_all(results)
        assert told['accuracy']==pytest.approx(teacher_of_all(results_of(done[1]))[1]['accuracy'], abs=1e-6)
        assert told['weights']==teacher.weights==digest(learn.model) and f'--teacher-file ./{file}' in told['command'] and not (tmp_path/file[:5]/'teachers').exists()
    assert runs['learner.pkl']==runs['state.pth']==runs['saved.pth']==[by_arm(results_of(done[1]), 'accuracy')[o][0] for o in ('control','kd')]

@pytest.mark.slow
def test_results_of_other_settings_stay(done, tmp_path, capsys):
    "Other epochs, another teacher: other runs, beside those on record, and not in their table"
    out = shutil.copytree(done[1], tmp_path/'out')
    before = results_of(out)
    save_network(wrn(10, 2), tmp_path/'new.pth')
    others = {('--epochs','1','--teacher-epochs','1'):['1','1'], ('--teacher-file',str(tmp_path/'new.pth')):['2','1']}  # the control has no teacher
    for args,seeds in others.items():
        main(['distill', *small[:-4], *args, '--seeds', '1', '--out', str(out)])
        told = capsys.readouterr().out.split('seconds a run')[1].split('\n\n')[0]
        assert [line.split()[1] for line in told.splitlines() if line.startswith(('control ','kd '))]==seeds
    after = results_of(out)
    assert {r:o['history'] for r,o in after.items() if r in before}=={r:o['history'] for r,o in before.items()}
    assert len(after)==7+3+3 and sum(bool(r.weights) for r in after)==1

@pytest.mark.slow
def test_a_file_that_has_changed_is_another_teacher(done, tmp_path):
    out = shutil.copytree(done[1], tmp_path/'out')
    file = shutil.copy(weights_of_teacher(out), tmp_path/'teacher.pth')
    args = [*small[:-2], '--method', 'kd', '--teacher-file', str(file), '--out', str(out)]
    main(['distill', *args])
    save_network(wrn(10, 2), file)
    main(['distill', *args])
    assert len({r.teacher for r in results_of(out) if r.teacher})==3 and len({o['teacher weights'] for r,o in results_of(out).items() if r.teacher})==2

@pytest.mark.slow
def test_other_images_are_refused(done, tmp_path, monkeypatch):
    out = shutil.copytree(done[1], tmp_path/'out')
    before = (out/'records.jsonl').read_bytes()
    monkeypatch.setattr('kdfast.experiments.sweep.images_of', lambda dls: dict(training=240, validation=599, first='other'))
    fails('holds results of other images of digits', *small[:-2], '--seeds', '3', '--out', out)
    assert (out/'records.jsonl').read_bytes()==before

def test_a_foreign_file_stays(tmp_path):
    for text in ('{', '[]', '{"runs": 3}', '{"state": "done", "settings": {"magic": 1}, "result": {}}', '{"settings": null}'):
        (tmp_path/'records.jsonl').write_text(text)
        fails('does not hold JSON lines of runs', '--out', tmp_path)
        assert (tmp_path/'records.jsonl').read_text()==text

@pytest.mark.slow
def test_pretrained_starts_from_the_weights_on_file(tmp_path, monkeypatch):
    "A file where torch.hub keeps what it has downloaded"
    set_seed(3)
    weights = torchvision.models.resnet18()
    file = torchvision.models.ResNet18_Weights.DEFAULT.url.split('/')[-1]
    (tmp_path/'hub/checkpoints').mkdir(parents=True)
    torch.save(weights.state_dict(), tmp_path/'hub/checkpoints'/file)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    args = '--pct .1 --size 16 --teacher resnet18 --student wrn-10-1 --method kd --epochs 1 --pretrained --lr 1e-7'.split()
    main(['distill', *args, '--out', str(tmp_path/'out')])
    file = weights_of_teacher(tmp_path/'out')
    teacher = torch.load(file, weights_only=True)
    assert teacher['network']=='torchvision.resnet18'
    assert (teacher['weights']['0.0.weight'].float()-weights.conv1.weight).abs().max()<1e-3
    assert teacher_of_all(results_of(tmp_path/'out'))[1]['parameters']>11e6
    main(['distill', *'--pct .1 --size 16 --teacher torchvision.resnet18 --student wrn-10-1 --method kd --epochs 1'.split(), '--teacher-file', str(file), '--out', str(tmp_path/'again')])
    assert len({teacher_of_all(results_of(tmp_path/o))[1]['weights'] for o in ('out','again')})==1

@pytest.mark.slow
def test_two_processes(tmp_path):
    "One says what happens and writes; the result is that of both"
    first,second = launch(2, kdfast_command, 'distill', *small[:-2], '--out', tmp_path/'two')
    assert 'kd+at from wrn-10-2, seed 0, epoch 2 of 2' in first and 'epoch' not in second and 'accuracy' not in second
    results = arms_of(results_of(tmp_path/'two'))
    assert len(results)==3 and {o['processes'] for o in results.values()}=={2}
    for r,o in results.items(): assert accuracy_of(load_learner(tmp_path/f"two/student-{r.method}.pkl").model, digits_dls(size=16))==o['accuracy']

def tiny_cifar(path):
    for part,c,i in itertools.product(('train','test'), ('cat','dog'), range(40)):
        (path/part/c).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.randint(0, 255, (32,32,3), dtype=np.uint8)).save(path/part/c/f'{i}.png')
    return path

@pytest.mark.slow
def test_an_archive_for_two_processes(tmp_path, monkeypatch):
    "It is unpacked once, and a part smaller than a batch is trained on"
    tiny_cifar(tmp_path)
    with tarfile.open(tmp_path/'data.tgz', 'w:gz') as f:
        for part in ('train','test'): f.add(tmp_path/part, part)
    args = f"--data cifar10 --path {tmp_path/'data.tgz'} --teacher wrn-10-2 --student wrn-10-1 --method kd --epochs 2 --out {tmp_path/'out'}".split()
    launch(2, kdfast_command, 'distill', *args, FASTAI_HOME=str(tmp_path/'home'))
    assert all(np.isfinite(o['history']['train_loss']).all() for o in results_of(tmp_path/'out').values())

def test_nothing_trained_is_no_result(tmp_path):
    fails('images make no batch of 512', '--data', 'cifar10', '--path', tiny_cifar(tmp_path), '--from-files', '--bs', '512', '--epochs', '1', '--teacher', 'wrn-10-1', '--out', tmp_path/'out')
    assert not [*(tmp_path/'out').glob('student-*')] and not results_of(tmp_path/'out')

@pytest.mark.slow
def test_arms_with_unequal_seeds(done, tmp_path, capsys):
    "A new arm is compared with the control of its own seeds, and the commands that made all of it are told"
    out = shutil.copytree(done[1], tmp_path/'out')
    args = [*small[:-4], '--teacher-epochs', '1', '--seeds', '1', '--out', str(out)]
    args[args.index('--method')+1] = 'at'
    main(['distill', *args])
    results,printed = results_of(out),capsys.readouterr().out
    accs = by_arm(results, 'accuracy')
    assert '--method kd,kd+at --epochs 2 --teacher-epochs 1 --seeds 2' in printed and '--method at' in printed and 'Undecided with one seed: at' in printed
    assert result_table(results).loc['at','against control (points)'].startswith(f"{100*(accs['at'][0]-accs['control'][0]):+.1f} (one seed)")
    assert [*result_table(results)['seeds']]==[1,2,2,2,1]

@pytest.mark.slow
def test_accelerate_launch(tmp_path):
    args = ['launch','--cpu','--num_processes','1','--num_machines','1','--mixed_precision','no','--dynamo_backend','no', kdfast_command, 'distill', *small[:-2]]
    res = subprocess.run([str(Path(sys.executable).parent/'accelerate'), *args, '--out', str(tmp_path/'out')], capture_output=True, text=True, timeout=200)
    assert res.returncode==0, res.stderr
    assert len(arms(results_of(tmp_path/'out')))==3

@pytest.mark.slow
def test_blocks_on_digits(tmp_path, capsys):
    "Every schedule by name, with a control and beside a term, and what a run of each leaves"
    names = ['blocks','blocks-nostem','blocks-parallel','simultaneous','blocks-pretrained','blocks-random','kd+blocks']
    main(f"distill --pct .2 --size 16 --teacher wrn-10-2 --student wrn-10-1 --method {','.join(names)} --epochs 6 --teacher-epochs 1 --out {tmp_path}/out".split())
    runs = {label_of(r):o for r,o in arms_of(results_of(tmp_path/'out')).items()}
    assert [*runs]==['control',*names]
    epochs = {k: [(s, r['history']['stage'].count(s)) for s in dict.fromkeys(r['history'].get('stage', ()))] for k,r in runs.items()}
    staged = [('group1',1),('group2',2),('group3',2),('classifier',1)]
    assert epochs['blocks']==epochs['blocks-nostem']==epochs['kd+blocks']==staged
    assert epochs['blocks-parallel']==[('parallel',5),('classifier',1)] and epochs['simultaneous']==[('simultaneous',5),('classifier',1)]
    assert epochs['blocks-pretrained']==[('labels',1),('group1',1),('group2',1),('group3',2),('classifier',1)] and epochs['blocks-random']==[('classifier',6)]
    assert all(len(r['history']['accuracy'])==6 and r['history']['accuracy'][-1]==r['accuracy'] for r in runs.values())
    assert 'kd' in runs['kd+blocks']['history'] and 'kd' not in runs['blocks']['history']
    assert [*runs['blocks-parallel']['fed']]==['group1','group2','group3']
    assert 'NaN' not in (tmp_path/'out/records.jsonl').read_text()
    out = capsys.readouterr().out
    assert 'blocks from wrn-10-2, seed 0, group2: 2 epochs on hints' in out and 'blocks from wrn-10-2, seed 0, classifier: 1 epoch on labels' in out
    assert load_learner(tmp_path/'out/student-blocks.pkl').model(torch.zeros(2,3,32,32)).shape==(2,10)

@pytest.mark.slow
def test_every_method_by_its_name(tmp_path):
    "Alone and in sums, with arguments, and in two stages"
    names = [*(o for o in methods() if o!='sigmoidkd'), 'kd+at+sp', 'crd+dml:peers=2', 'factortransfer:k=.25+kd+two-stages', 'ab+kd+two-stages']
    main(f"distill --pct .1 --size 16 --teacher wrn-10-2 --student wrn-10-1 --method {','.join(names)} --epochs 2 --teacher-epochs 1 --out {tmp_path}/out".split())
    runs = {label_of(r):o for r,o in arms_of(results_of(tmp_path/'out')).items()}
    assert [*runs]==['control',*names]
    columns = lambda arm: [o.split(':')[0] for o in arm.split('+') if o!='two-stages']
    assert all(max(r['history'][c])>0 for k,r in runs.items() if k!='control' for c in columns(k))
    assert runs['ab+kd+two-stages']['history']['stage']==['first','second'] and runs['ab+kd+two-stages']['history']['ab'][1]==0
    bare = {*wrn(10, 1).state_dict()}
    assert all({*load_learner(tmp_path/'out'/f).model.state_dict()}==bare for f in ('student-crd.pkl','student-dml.pkl','student-factortransfer.pkl'))

@pytest.mark.parametrize('options,message', [('--method blocks --epochs 3', 'too few for 3 stages'), ('--method kd+two-stages', 'No term is meant for a first stage'), ('--method blocks+simultaneous', 'choose one of blocks and simultaneous'),
    ('--method blocks-parallel --student wrn-10-4', 'at least as wide'), ('--method block', 'blocks-parallel')])
def test_blocks_that_cannot_be_are_refused_before_training(options, message, tmp_path):
    with pytest.raises(SystemExit, match=message): main(f'distill --pct .2 --teacher wrn-10-2 --out {tmp_path}/out {options}'.split())
    assert not (tmp_path/'out').exists()

@pytest.mark.slow
def test_three_commands_at_once_share_a_folder(tmp_path):
    "One trains the teacher and one the control, all end well, and nothing is lost"
    args = warm.command(kdfast_command, *'distill --pct .2 --size 16 --teacher wrn-10-2 --epochs 2 --teacher-epochs 1 --out'.split(), tmp_path/'out')
    started = [subprocess.Popen([*args, '--method', o], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for o in ('kd','at','dkd')]
    told = [o.communicate(timeout=300)[0] for o in started]
    assert [o.returncode for o in started]==[0]*3, told
    assert {label_of(r) for r in arms_of(results_of(tmp_path/'out'))}=={'control','kd','at','dkd'} and len(results_of(tmp_path/'out'))==5
    assert sum('wrn-10-1 control, seed 0: ' in o for o in told)==sum('Teacher wrn-10-2: ' in o.split('Accuracy')[0].split('\n\n')[0] for o in told)==1
