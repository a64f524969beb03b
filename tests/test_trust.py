"Files that run code when they are opened, and files that do not: each row of the page with a file that tries"
import json, os, pickle, re, zipfile, pytest
from fastai.vision.all import *
from kdfast.all import *
from kdfast.cli import main
from kdfast.data.memory import open_image
from kdfast.experiments.arm import load_network
from kdfast.experiments.checkpoint import EpochCheckpoint
from kdfast.experiments.records import Records
from kdfast.experiments.run import Run
from kdfast.experiments.sweep import Sweep

class Evil:
    "Makes a folder when it is unpickled"
    def __init__(self, mark): self.mark = mark
    def __reduce__(self): return os.mkdir,(str(self.mark),)

def by_torch(evil, file): torch.save(dict(wrn(10, 1).state_dict(), weights=evil), file)

def by_pickle(evil, file): file.write_bytes(pickle.dumps(evil))

def program(evil, file):
    "A sound one with another sample input"
    sound,inputs = file.with_name('sound.pt2'),file.with_name('inputs.pth')
    export_program(wrn(10, 1), sound, 32)
    torch.save(evil, inputs)
    with zipfile.ZipFile(sound) as a, zipfile.ZipFile(file, 'w') as b:
        for o in a.namelist(): b.writestr(o, inputs.read_bytes() if 'sample_inputs' in o else a.read(o))

def cache(evil, folder):
    folder.mkdir()
    np.save(folder/'0.npy', np.array([evil], dtype=object), allow_pickle=True)
    (folder/'meta.json').write_text(json.dumps(dict(files=dict(sums='0.npy'))))

run,simkd = Run(epochs=1),Run(method='simkd', teacher=Run(epochs=1), epochs=1)

def finished(run, make, evil, folder):
    "A folder of results in which a network is not what it should be"
    sweep = Sweep('theirs', [run], folder)
    for o in sweep.runs: sweep.records.add(o, dict(accuracy=.9, seconds=1.))
    file = sweep.file_of(run)
    file.parent.mkdir()
    make(evil, file)

def network_in(run, folder): return Sweep('theirs', [run], folder).network(run)

def weights_in(options, file): main(['distill','--teacher','wrn-10-1',*options,str(file),'--out',str(file.parent/'out')])

rows = {
    '`distill_learner`, `Teacher`: an exported learner': ('t.pkl', by_torch, lambda f: distill_learner(digits_dls(), f, wrn(10, 1))),
    '`--teacher-file`: an exported learner': ('t.pkl', by_torch, partial(weights_in, ['--teacher-file'])),
    '`--teacher-file`, `load_network`: weights': ('t.pth', by_torch, lambda f: load_network(wrn(10, 1), f)),
    '`--teacher-weights`, `Teacher(name, weights=)`': ('t.pth', by_torch, lambda f: Teacher('test_resnet', weights=f)),
    '`learn.load`': ('t.pth', by_torch, lambda f: Learner(digits_dls(), wrn(10, 1)).load(f.with_suffix(''))),
    'a folder of results: `records.jsonl`': ('records.jsonl', by_pickle, Records),
    'a folder of results: networks in `.pth`': ('out', partial(finished, run, by_torch), partial(network_in, run)),
    'a folder of results: networks in `.pkl`, of `compress` and `simkd`': ('out', partial(finished, simkd, by_torch), partial(network_in, simkd)),
    'a folder of results: `.checkpoints`': ('t.pth', by_torch, EpochCheckpoint),
    '`TeacherCache`': ('cache', cache, lambda f: TeacherCache(f).recorded()),
    '`ProgramModel`': ('t.pt2', program, lambda f: ProgramModel(f).open()),
    '`OnnxModel`': ('t.onnx', by_pickle, lambda f: OnnxModel(f).open()),
    '`--data`, `folder_dls`: images': ('t.png', by_pickle, open_image)}

def page():
    "Entry to what the table says of it"
    cells = json.loads((Path(__file__).parent.parent/'nbs/howto/trust.ipynb').read_text())['cells']
    table = first(s for o in cells if (s := ''.join(o['source'])).startswith('| entry |'))
    return {k.strip():said.strip() for k,_,said in (line.strip('|').split('|') for line in table.splitlines()[2:])}

def test_the_table_lists_what_is_tried(): assert [*page()]==[*rows]

@pytest.mark.parametrize('entry', rows)
def test_a_malicious_file(entry, tmp_path):
    name,make,enter = rows[entry]
    if name=='t.onnx': pytest.importorskip('onnxruntime')
    if 'weights=' in entry: pytest.importorskip('timm')
    file,evil = tmp_path/'theirs'/name,Evil(tmp_path/'mark')
    file.parent.mkdir(parents=True)
    make(evil, file)
    try: enter(file)
    except (Exception,SystemExit): pass  # of no use as it is
    assert evil.mark.exists()==(page()[entry]=='yes')

@pytest.mark.parametrize('name', ['t.pth','t.pt','t','t.pkl.txt'])
def test_only_a_pkl_is_run_as_a_learner(name, tmp_path):
    by_torch(Evil(tmp_path/'mark'), tmp_path/name)
    with pytest.raises(ValueError, match='its name does not end in .pkl'): distill_learner(digits_dls(), tmp_path/name, wrn(10, 1))
    assert not (tmp_path/'mark').exists()

def test_fastais_warning_is_shown(tmp_path):
    by_torch(Evil(tmp_path/'mark'), tmp_path/'t.pkl')
    with pytest.warns(UserWarning, match='insecure pickle'), pytest.raises(ValueError): distill_learner(digits_dls(), tmp_path/'t.pkl', wrn(10, 1))

def test_the_command_says_that_a_learner_is_a_program(tmp_path, capsys):
    by_torch(Evil(tmp_path/'mark'), tmp_path/'t.pkl')
    with pytest.raises(SystemExit): weights_in(['--teacher-file'], tmp_path/'t.pkl')
    assert 't.pkl is a pickle, and opening it runs code' in capsys.readouterr().out

def test_a_cache_reads_its_own_folder_alone(tmp_path):
    np.save(tmp_path/'secret.npy', np.zeros(3))
    cache(0, tmp_path/'cache')
    (tmp_path/'cache/meta.json').write_text(json.dumps(dict(files=dict(sums='../secret.npy'))))
    with pytest.raises(ValueError, match='is not a cache, or is damaged'): TeacherCache(tmp_path/'cache').recorded()
