"Files that run without kdfast"
import json, os, pickle, sys, time, onnx, onnxruntime, pytest, torchvision
from conftest import few_digits, slow_but
from fastai.vision.all import *
from kdfast.all import *

@pytest.fixture
def dls(): return few_digits(size=32)

def relative(a, b): return ((a-b).norm()/b.norm()).item()

nets = {'wrn': lambda: wrn(10, 1), 'separable': lambda: wrn(10, 1, conv=Separable), 'hashed': lambda: wrn(10, 1, conv=partial(Hashed, ratio=.5)), 'mobile': lambda: mobile(width=.25), 'torchvision': lambda: torchvision.models.resnet18(num_classes=10)}

@pytest.mark.parametrize('in_int8', [False,True])
@pytest.mark.parametrize('name', slow_but('wrn', of=nets))
def test_files_are_the_network(name, in_int8, dls, tmp_path):
    net = nets[name]().eval()
    for b in dls.train: net.train()(b[0].as_subclass(Tensor))
    net.eval()
    if in_int8: net,_ = quantize(net, dls)
    x = dls.valid.one_batch()[0].as_subclass(Tensor)
    session = lambda f: onnxruntime.InferenceSession(f, providers=['CPUExecutionProvider']).run(None, {'images':x[:5].numpy()})[0]
    files = export_onnx(net, tmp_path/'net.onnx', 32),export_program(net, tmp_path/'net.pt2', 32)
    outs = torch.from_numpy(session(tmp_path/'net.onnx')),torch.export.load(tmp_path/'net.pt2').module()(x[:5])
    with torch.no_grad():
        for model,out in zip(files, outs):
            assert relative(model(x), net(x))<(.1 if in_int8 else 1e-5) and torch.equal(model(x[:5]), out)
            assert count_params(model)==count_params(net) and count_macs(model, 32)==count_macs(net, 32)
            assert compare({'file':model}, 32, reps=1).loc['file','MB on disk']==round(model.file.stat().st_size/1e6, 2)
    assert {o.name for o in tmp_path.iterdir()}=={'net.onnx','net.pt2'}

@pytest.mark.slow
def test_an_int8_file_is_a_quarter(dls, tmp_path):
    net = wrn(16, 2).eval()
    full,small = export_onnx(net, tmp_path/'full.onnx', 32),export_onnx(quantize(net, dls)[0], tmp_path/'int8.onnx', 32)
    assert small.file.stat().st_size<.32*full.file.stat().st_size
    ops = {n.op_type for n in onnx.load(small.file).graph.node}
    assert {'QuantizeLinear','DequantizeLinear'}<=ops

def test_of_a_learner(dls, teacher, quiet, tmp_path):
    learn = distill_learner(dls, teacher, wrn(10, 1), cbs=[KD(),FitNet()], metrics=accuracy, path=tmp_path)
    quiet(learn, 1)
    learn.model.train()
    files = learn.export_onnx(),learn.export_program('sub/it.pt2')
    assert files==(tmp_path/'student.onnx',tmp_path/'sub/it.pt2') and learn.model.training
    about = {o.key:o.value for o in onnx.load(files[0]).metadata_props}
    assert json.loads(about['classes'])==[str(o) for o in dls.vocab] and about['size']=='3x32x32'
    assert [json.loads(about[k]) for k in ('mean','std')]==[[o]*3 for o in (.305,.36)]
    ours = Learner(dls, OnnxModel(files[0]), metrics=accuracy)
    with learn.no_bar(), ours.no_bar(): assert ours.validate()[1]==pytest.approx(learn.validate()[1], abs=1e-6)
    with pytest.raises(ValueError, match='An exported file cannot be trained'): quiet(ours, 1)
    x = dls.valid.one_batch()[0].as_subclass(Tensor)
    assert torch.equal(pickle.loads(pickle.dumps(ours.model))(x), ours.model(x))

def test_a_file_tells_nothing_of_this_machine(tmp_path):
    export_onnx(wrn(10, 1), tmp_path/'net.onnx', 32)
    text = (tmp_path/'net.onnx').read_bytes()
    assert str(Path(__file__).parent.parent).encode() not in text and b'site-packages' not in text and b'.py' not in text

class Decides(nn.Module):
    def forward(self, x): return x.flatten(1) if x.mean()>0 else -x.flatten(1)

class Wrong(nn.Module):
    "Gives something else each time"
    def forward(self, x): return torch.rand_like(x.flatten(1))

@pytest.mark.parametrize('to,name', [(export_onnx,'net.onnx'), (export_program,'net.pt2')])
def test_bad_input(to, name, tmp_path, capfd):
    (tmp_path/name).write_text('before')
    for net,message in ((Decides(),'cannot be exported as'), (Wrong(),'differs from the network by')):
        with pytest.raises(ValueError, match=message): to(net, tmp_path/name, 8)
        assert (tmp_path/name).read_text()=='before' and [*tmp_path.iterdir()]==[tmp_path/name]
    assert 'torch.ops' not in ''.join(capfd.readouterr())
    with pytest.raises(FileNotFoundError, match='other.onnx'): OnnxModel(tmp_path/'other.onnx')

def test_without_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnx', None)
    with pytest.raises(ImportError, match=r'pip install kdfast\[onnx\]'): export_onnx(wrn(10, 1), tmp_path/'x.onnx', 32)
    assert not [*tmp_path.iterdir()]

@pytest.mark.slow
@pytest.mark.parametrize('dtype', [torch.float64,torch.bfloat16])
def test_other_precisions_are_written_as_float32(dtype, tmp_path):
    net = wrn(10, 1).eval().to(dtype)
    file,program,x = export_onnx(net, tmp_path/'net.onnx', 32),export_program(net, tmp_path/'net.pt2', 32),torch.randn(2,3,32,32)
    with torch.no_grad(): want = deepcopy(net).float()(x)
    assert relative(file(x), want)<1e-4 and relative(program(x), want)<1e-4 and next(net.parameters()).dtype==dtype

class Two(nn.Module):
    def forward(self, x): return x.flatten(1),x

def test_two_outputs(tmp_path):
    for to,name in ((export_onnx,'net.onnx'),(export_program,'net.pt2')):
        with pytest.raises(ValueError, match='must output one tensor, got a tuple'): to(Two(), tmp_path/name, 8)

def test_logging_is_as_it_was(tmp_path):
    import logging
    logging.disable(logging.CRITICAL)
    try:
        export_program(wrn(10, 1), tmp_path/'net.pt2', 32)
        assert logging.root.manager.disable==logging.CRITICAL
    finally: logging.disable(logging.NOTSET)

@pytest.mark.slow
def test_fastais_unet(tmp_path):
    "It ends in a layer that changes a tensor's type, which cannot be traced"
    net,x = DynamicUnet(create_body(wrn(10, .25), pretrained=False), 4, (32,32)),torch.rand(2, 3, 32, 32)
    with probing(net): want = Tensor(net(x))
    for export in (export_onnx,export_program): assert torch.allclose(export(net, tmp_path/'unet.bin', 32)(x), want, atol=1e-4)
    assert 'ToTensorBase' in str(net)

def test_a_link_at_the_place_of_a_half_written_file_is_not_followed(tmp_path):
    "Whoever may write to the folder cannot have another file overwritten"
    from kdfast.core import whole_file
    (tmp_path/'precious').write_text('kept')
    (tmp_path/'.a.txt.part').symlink_to(tmp_path/'precious')
    with whole_file(tmp_path/'a.txt') as f:
        assert f.exists() and not f.is_symlink()
        f.write_text('new')
        with whole_file(tmp_path/'a.txt') as g: g.write_text('second')
    assert (tmp_path/'a.txt').read_text()=='new' and (tmp_path/'precious').read_text()=='kept'
    assert {o.name for o in tmp_path.iterdir()}=={'a.txt','precious','.a.txt.part'}

def test_what_a_killed_writer_has_left_goes(tmp_path):
    from kdfast.core import whole_file
    for name,age in (('.a.txt.0123.part',7200), ('.a.txt.4567.part',10), ('.b.txt.89ab.part',7200)):
        (tmp_path/name).write_text('half')
        os.utime(tmp_path/name, (time.time()-age,)*2)
    with whole_file(tmp_path/'a.txt') as f: f.write_text('new')
    assert {o.name for o in tmp_path.iterdir()}=={'a.txt','.a.txt.4567.part','.b.txt.89ab.part'}
