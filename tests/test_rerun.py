"Cells of committed tables, trained anew"
import importlib.util, json, pytest
from fastai.vision.all import *
from kdfast.cli import main
from kdfast.experiments.records import Records
from kdfast.experiments.research import research

root = Path(__file__).parent.parent

@pytest.fixture
def rerun():
    spec = importlib.util.spec_from_file_location('rerun', root/'tools/rerun.py')
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module

def lines(folder): return [json.loads(o) for o in (folder/'reruns.jsonl').read_text().splitlines()]

def test_a_folder_without_records_is_refused(rerun, tmp_path, capsys):
    with pytest.raises(SystemExit): rerun.main(['random','--results',str(tmp_path)])
    assert 'records.jsonl has no results: pass --results' in capsys.readouterr().err

@pytest.mark.slow
def test_a_cell_trained_anew_is_compared_with_its_record(rerun, tmp_path, monkeypatch, capsys):
    "On this machine it is the same to the last image; a record that says otherwise is found out, and a cell that takes too long is named"
    monkeypatch.setattr(rerun, 'schedule', 'smoke')
    monkeypatch.setattr(rerun, 'seed_noise', lambda *args: 1.)
    main(['table','sanity','--schedule','smoke','--rows','16-1 from 16-2','--arms','KD','--out',str(tmp_path)])
    cell = ['sanity/16-1 from 16-2/KD','--results',str(tmp_path)]
    rerun.main(cell)
    rerun.main([*cell,'--minutes','0'])
    file = tmp_path/'records.jsonl'
    file.write_text(''.join(f'{json.dumps(dict(o, result=dict(o["result"], accuracy=o["result"]["accuracy"]+.1)))}\n' for o in map(json.loads, file.read_text().splitlines())))
    with pytest.raises(SystemExit, match='Differs from the record: sanity differs'): rerun.main(cell)
    found = lines(tmp_path)
    assert [o['state'] for o in found]==['agrees','not run','differs'] and found[0]['now']==pytest.approx(found[0]['recorded'])
    assert 'about' in capsys.readouterr().out and {'device','commit','finished'} <= {*found[0]}

@pytest.mark.slow
def test_random_is_a_cell_of_each_committed_table(rerun, tmp_path, monkeypatch):
    "Chosen by the seed, one run on record each"
    monkeypatch.setattr(rerun, 'again', lambda table, run, known, *args: 100*known[run]['accuracy'])
    monkeypatch.setattr(rerun, 'estimate', lambda runs: pd.DataFrame(dict(minutes=[1.])))
    for o in ('records.jsonl','tables'): (tmp_path/o).symlink_to(root/'results'/o)
    for seed in '0010': rerun.main(['random','--seed',seed,'--results',str(tmp_path)])
    found = lines(tmp_path)
    names = [o.stem.removesuffix('-cpu') for o in (root/'results/tables').glob('*-cpu.md')]
    n = len(names)
    assert n>5 and sorted(o['table'] for o in found[:n])==sorted(names) and {o['state'] for o in found}<={'agrees','no seeds'}
    what = lambda rows: [(o['table'],o['row'],o['arm'],o['seed']) for o in rows]
    assert what(found[:n])==what(found[n:2*n])==what(found[3*n:])!=what(found[2*n:3*n])
    with pytest.raises(SystemExit): rerun.main(['sanity/16-1 from 16-2/banana','--results',str(tmp_path)])

def test_a_cell_without_its_data_does_not_keep_the_others(rerun, tmp_path, monkeypatch, capsys):
    def again(table, run, known, *args):
        if table.data!='digits': raise OSError('no network\nand more')
        return 100*known[run]['accuracy']
    monkeypatch.setattr(rerun, 'again', again)
    monkeypatch.setattr(rerun, 'estimate', lambda runs: pd.DataFrame(dict(minutes=[1.])))
    for o in ('records.jsonl','tables'): (tmp_path/o).symlink_to(root/'results'/o)
    with pytest.raises(SystemExit, match='sanity failed'): rerun.main(['random','--results',str(tmp_path)])
    states = {o['table']:o['state'] for o in lines(tmp_path)}
    assert states['shares']==states['methods']=='agrees' and states['sanity']=='failed' and 'no network: failed' in capsys.readouterr().out

def test_the_noise_of_a_seed(rerun):
    "The cell's own, at least the median of the table, or of tables with the same data; None where nothing has several seeds"
    def cells(*stds): return pd.DataFrame([dict(row='a', arm=f'{i}', n=3 if o else 1, std=o or np.nan) for i,o in enumerate(stds)])
    one,other,alone = (research[o] for o in ('sanity','taps','stagewise'))
    of = {one:cells(.5, 1., 4., None), other:cells(None), alone:cells(None)}
    assert [rerun.seed_noise(one, 'a', o, of) for o in '0123']==[1., 1., 4., 1.] and rerun.seed_noise(other, 'a', '0', of)==1.
    assert rerun.seed_noise(alone, 'a', '0', of) is None
