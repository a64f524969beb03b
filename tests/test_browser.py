"The page nbs/howto/classify.html in Chromium: what it makes of images that are dropped on it"
import json, os, select, shutil, subprocess, pytest
from functools import partial
from fastai.vision.all import *
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from kdfast.all import *
from kdfast.predict import predict_file
from PIL import ImageOps, PngImagePlugin
from threading import Thread

root = Path(__file__).parent.parent
html = root/'nbs/howto/classify.html'
chromium = first(filter(None, map(shutil.which, ('chromium','chromium-browser','google-chrome'))))
cdn,version = re.search(r"https://[^']*/onnxruntime-web@([\d.]+)", html.read_text()).group(0, 1)
ort = Path(os.environ.get('ONNXRUNTIME_WEB', root/'node_modules/onnxruntime-web'))
installed = ort.exists() and json.loads((ort/'package.json').read_text())['version']==version
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not chromium, reason='needs chromium'),
    pytest.mark.skipif(not installed, reason=f'needs onnxruntime-web {version} from npm, in node_modules or where ONNXRUNTIME_WEB says')]

class Browser:
    "Chromium's DevTools protocol, over pipes"
    def __init__(self, folder):
        (theirs,self.to),(self.back,ours) = os.pipe(),os.pipe()
        flags = '--headless','--no-sandbox','--disable-gpu','--disable-dev-shm-usage','--remote-debugging-pipe',f'--user-data-dir={folder}'
        command = 'bash','-c',f'exec "$0" "$@" 3<&{theirs} 4>&{ours}',chromium,*flags,'about:blank'
        self.process = subprocess.Popen(command, pass_fds=(theirs,ours), stderr=subprocess.DEVNULL)
        for o in (theirs,ours): os.close(o)
        self.n,self.rest,self.events,self.about = 0,b'',[],{}
        page = first(self('Target.getTargets')['targetInfos'], lambda o: o['type']=='page')
        self.about = dict(sessionId=self('Target.attachToTarget', targetId=page['targetId'], flatten=True)['sessionId'])
        for o in ('Runtime','Page','DOM'): self(f'{o}.enable')

    def _message(self):
        while b'\0' not in self.rest:
            assert select.select([self.back], [], [], 60)[0], "Chromium does not answer"
            self.rest += (got := os.read(self.back, 2**16))
            assert got, "Chromium has ended"
        message,_,self.rest = self.rest.partition(b'\0')
        return json.loads(message)

    def __call__(self, method, **params):
        self.n += 1
        os.write(self.to, json.dumps(dict(id=self.n, method=method, params=params, **self.about)).encode()+b'\0')
        while (answer := self._message()).get('id')!=self.n: self.events.append(answer)
        assert 'error' not in answer, (method, answer)
        return answer['result']

    def js(self, code):
        answer = self('Runtime.evaluate', expression=code, awaitPromise=True, returnByValue=True)
        assert 'exceptionDetails' not in answer, answer
        return answer['result'].get('value')

    def told(self, start):
        "What the page shows once its status begins with `start`, or after half a minute: that line, and a score a class"
        return (lambda said,rows: (said,dict(rows)))(*self.js('''(async () => {
            const status = () => document.querySelector('[role=status]')?.textContent
            for (let i = 0; i < 1500 && !status()?.startsWith(%s); i++) await new Promise(o => setTimeout(o, 20))
            return [status(), Array.from(document.querySelectorAll('tr'), o => [o.firstChild.textContent, +o.querySelector('data').value])]
        })()''' % json.dumps(start)))

    def drop(self, *files):
        "Drop all at once; returns what the page shows of the last"
        data = dict(items=[], files=[*map(str, files)], dragOperationsMask=1)
        for o in ('dragEnter','dragOver','drop'): self('Input.dispatchDragEvent', type=o, x=100, y=200, data=data)
        return self.told(f'{files[-1].name}: ')

    def choose(self, file):
        found = self('DOM.querySelector', nodeId=self('DOM.getDocument')['root']['nodeId'], selector='input')
        self('DOM.setFileInputFiles', files=[str(file)], **found)
        return self.told(f'{file.name}: ')

    def close(self):
        self.about = {}
        self('Browser.close')
        self.process.wait(30)
        for o in (self.to,self.back): os.close(o)

class Files(SimpleHTTPRequestHandler):
    extensions_map = {**SimpleHTTPRequestHandler.extensions_map, '.mjs':'text/javascript', '.wasm':'application/wasm'}
    def log_message(self, *args): pass

@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "A folder that a server on this machine serves, with the page, and its address"
    folder = tmp_path_factory.mktemp('site')
    (folder/'classify.html').write_text(html.read_text().replace(cdn, './ort'))
    (folder/'ort').symlink_to(ort.resolve())
    with ThreadingHTTPServer(('127.0.0.1', 0), partial(Files, directory=folder)) as server:
        Thread(target=server.serve_forever).start()
        yield folder,f'http://127.0.0.1:{server.server_port}/classify.html'
        server.shutdown()

@pytest.fixture(scope='module')
def browser(tmp_path_factory):
    "Chromium; no script may fail in it"
    browser = Browser(tmp_path_factory.mktemp('chromium'))
    yield browser
    browser.close()
    assert [o for o in browser.events if o['method']=='Runtime.exceptionThrown']==[]

def opened(browser, site, learn=None, **kwargs):
    "The page, opened anew, with this student"
    folder,url = site
    (folder/'student.onnx').unlink(missing_ok=True)
    if learn: learn.deploy(folder/'student.onnx', **kwargs)
    browser('Page.navigate', url=url)
    return browser.told(f'{learn.dls.c} classes: ' if learn else 'No student')[0]

def agree(got, file, image, tol=1e-4):
    "Whether the page has shown what `predict_file` finds"
    want = predict_file(file, image, 99)
    return first(got)==first(want) and len(got)==min(5, len(want)) and got==pytest.approx({k:want[k] for k in got}, abs=tol)

@pytest.fixture
def learn(dls, trained, tmp_path): return distill_learner(dls, None, trained, metrics=accuracy, path=tmp_path)

def test_images_that_are_dropped_or_chosen(learn, dls, browser, site, tmp_path):
    assert opened(browser, site, learn)=='10 classes: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9'
    net,sure = site[0]/'student.onnx',0
    for i,give in enumerate((browser.drop,browser.drop,browser.choose,browser.choose)):
        x,y = dls.valid_ds[i]
        file = tmp_path/f'{i}.png'
        Image.fromarray(x.permute(1,2,0).numpy()).resize((120+5*i,90)).save(file)
        said,got = give(file)
        assert re.fullmatch(rf'{i}.png: \d+ ms', said) and len(got)==5 and agree(got, net, file)
        sure += max(got.values())
    learn.deploy('int8.onnx', int8=True, agree=.9)
    file = file.rename(tmp_path/'again.png')
    assert agree(browser.drop(tmp_path/'int8.onnx', file)[1], tmp_path/'int8.onnx', file, .05)
    assert sure>2 and browser.js("document.querySelector('img').naturalWidth")==135

def test_images_of_every_kind(learn, browser, site, tmp_path):
    "What Pillow reads, but what is transparent is black, and a photo with an orientation is turned upright"
    opened(browser, site, learn)
    net,rng,exif,gamma = site[0]/'student.onnx',np.random.default_rng(0),Image.Exif(),PngImagePlugin.PngInfo()
    exif[274] = 6
    gamma.add(b'gAMA', (100000).to_bytes(4, 'big'))
    rgb = Image.fromarray(rng.integers(0, 256, (6,9,3), dtype=np.uint8)).resize((61,43))
    kinds = {'color.jpg':rgb, 'grey.jpg':rgb.convert('L'), 'grey.png':rgb.convert('L'), 'palette.gif':rgb.quantize(16),
        'opaque.png':rgb.convert('RGBA'), 'bits.png':rgb.convert('1'), 'lossy.webp':rgb}
    for name,image in kinds.items():
        image.save(tmp_path/name)
        assert agree(browser.drop(tmp_path/name)[1], net, tmp_path/name), name
    rgb.save(tmp_path/'gamma.png', pnginfo=gamma)
    assert agree(browser.drop(tmp_path/'gamma.png')[1], net, rgb)
    clear,black = rgb.convert('RGBA'),rgb.copy()
    clear.putalpha(Image.fromarray(np.uint8(255)*(np.arange(61)>30)[None].repeat(43, 0).astype(np.uint8)))
    black.paste(0, (0,0,31,43))
    clear.save(tmp_path/'clear.png')
    assert agree(browser.drop(tmp_path/'clear.png')[1], net, black)
    rgb.save(tmp_path/'turned.jpg', exif=exif)
    got,lying = browser.drop(tmp_path/'turned.jpg')[1],Image.open(tmp_path/'turned.jpg')
    assert agree(got, net, ImageOps.exif_transpose(lying)) and not agree(got, net, lying)

class Grey(nn.Sequential):
    def __init__(self, n_out): super().__init__(nn.Conv2d(1, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, n_out))

def test_grey_students_logits_and_names(browser, site, tmp_path):
    names,rng = ['café','<b>"bold"</b>'],np.random.default_rng(0)
    for i in range(8): Image.fromarray(rng.integers(0, 256, (30,20+i,3), dtype=np.uint8)).save(tmp_path/f'{i}.png')
    kwargs = dict(item_tfms=Resize(24), batch_tfms=Normalize.from_stats([.5],[.3]), img_cls=PILImageBW, bs=2, num_workers=0, valid_pct=.5)
    dls = ImageDataLoaders.from_lists(tmp_path, get_image_files(tmp_path), names*4, **kwargs)
    opened(browser, site, distill_learner(dls, None, Grey, path=tmp_path), softmax=False)
    for i in range(3):
        got = browser.drop(tmp_path/f'{i}.png')[1]
        assert {*got}=={*names} and agree(got, site[0]/'student.onnx', tmp_path/f'{i}.png')

def test_what_cannot_be_classified(learn, browser, site, tmp_path):
    assert opened(browser, site)=='No student.onnx alongside this page: drop yours here'
    (tmp_path/'text.png').write_text('text')
    Image.new('RGB', (20,20)).save(tmp_path/'plain.png')
    assert browser.drop(tmp_path/'plain.png')==('plain.png: Drop the file that learn.deploy wrote',{})
    learn.export_onnx('network.onnx')
    assert browser.drop(tmp_path/'network.onnx')==('network.onnx: This file takes no pixels: write it with learn.deploy',{})
    learn.deploy('fixed.onnx', resize='none')
    assert browser.drop(tmp_path/'fixed.onnx')==('fixed.onnx: This file takes images of 16x16 pixels, got one of 20x20',{})
    assert 'could not be decoded' in browser.drop(tmp_path/'text.png')[0]
