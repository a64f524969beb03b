"""Processes that have imported fastai before they start: importing takes longer than most of what the tests do in processes of their own

`command(*args)` is for `subprocess` what `[sys.executable, *args]` is. A server, one for each process of pytest, has imported everything and forks for each command. What subprocess starts is a client: it hands over its files, folder and
environment, passes signals on, and ends as the command ends, which ends with it. Tests about how Python starts or ends do without."""
import fcntl, json, os, select, shutil, signal, socket, subprocess, sys
from contextlib import suppress

passed_on = signal.SIGINT,signal.SIGTERM,signal.SIGHUP

def _run(args):
    "As `python args` would, in this process"
    import runpy, warnings
    if args[:2]==['-W','ignore']:
        warnings.simplefilter('ignore')
        args = args[2:]
    sys.argv = args if args[0] not in ('-c','-m') else [args[0], *args[2:]]
    if args[0]=='-c':
        main = sys.modules['__main__']
        main.__dict__.pop('__file__')  # or what it spawns would run this file
        exec(compile(args[1], '<string>', 'exec'), main.__dict__)
    elif args[0]=='-m': runpy.run_module(args[1], run_name='__main__', alter_sys=True)
    else:
        sys.path.insert(0, os.path.dirname(os.path.abspath(args[0])))
        runpy.run_path(args[0], run_name='__main__')

def _become(request, files):
    "Be the command, in a fork of the server"
    import atexit, random, threading, numpy, torch, traceback, warnings
    for i,f in zip(request['files'], [fcntl.fcntl(o, fcntl.F_DUPFD, 200) for o in files]): os.dup2(f, i)  # none onto one that is still to be read
    for o in passed_on: signal.signal(o, signal.default_int_handler if o==signal.SIGINT else signal.SIG_DFL)
    sys.stdin,sys.stdout,sys.stderr = open(0, closefd=False),open(1, 'w', closefd=False),open(2, 'w', 1, closefd=False)
    os.chdir(request['folder'])
    os.environ.clear()
    os.environ.update(request['env'])
    if 'OMP_NUM_THREADS' in os.environ: torch.set_num_threads(int(os.environ['OMP_NUM_THREADS']))
    if os.environ.get('PYTHONWARNINGS')=='ignore': warnings.simplefilter('ignore')
    random.seed()
    numpy.random.seed()
    code = 0
    try: _run(request['args'])
    except SystemExit as e:
        if isinstance(e.code, str): print(e.code, file=sys.stderr)
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)

def _fork(conn, running):
    request,files,*_ = socket.recv_fds(conn, 2**20, 16)
    pid = os.fork()
    if not pid:
        for o in running.values(): o.close()
        _become(json.loads(request), files)
    for f in files: os.close(f)
    conn.send(str(pid).encode())
    running[pid] = conn

def serve(path):
    "Fork for each command, until stdin is closed"
    import fastai.vision.all, kdfast.cli, timm
    running = {}
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as door:
        door.bind(path)
        door.listen()
        print('ready', flush=True)
        while 0 not in (ready := select.select([0,door,*running.values()], [], [], .02 if running else None)[0]):
            if door in ready: _fork(door.accept()[0], running)
            for pid,conn in [*running.items()]:
                if conn in ready: os.kill(pid, signal.SIGKILL)  # the client was killed
                done,status = os.waitpid(pid, 0 if conn in ready else os.WNOHANG)
                if not done: continue
                with running.pop(pid), suppress(OSError): conn.send(str(status).encode())
    shutil.rmtree(os.path.dirname(path))

def ask(path, *args):
    "What `subprocess` starts"
    conn = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    conn.connect(path)
    files = [int(o) for o in os.listdir('/proc/self/fd') if os.path.exists(f'/proc/self/fd/{o}') and os.get_inheritable(int(o))]  # with those of `pass_fds`
    socket.send_fds(conn, [json.dumps(dict(args=args, folder=os.getcwd(), env=dict(os.environ), files=files)).encode()], files)
    pid = int(conn.recv(64))
    for o in passed_on: signal.signal(o, lambda n,_: os.kill(pid, n))
    code = os.waitstatus_to_exitcode(int(conn.recv(64)))
    if code<0:
        if code!=-signal.SIGKILL: signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)

server = None

def command(
    *args # As for `python`: a script, `-m`, `-c`, after `-W ignore`
):
    "Arguments for `subprocess`"
    global server
    import tempfile
    if server is None:
        path = os.path.join(tempfile.mkdtemp(), 'door')
        process = subprocess.Popen([sys.executable, '-W', 'ignore', __file__, 'serve', path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdout.readline()==b'ready\n'
        server = process,path
    return [sys.executable, '-I', '-S', __file__, 'ask', server[1], *map(str, args)]

if __name__=='__main__': dict(serve=serve, ask=ask)[sys.argv[1]](*sys.argv[2:])
