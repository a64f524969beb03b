"""The outputs that the notebooks keep, as a kernel gives them: `python tools/outputs.py [notebook ...]`; cells marked `eval: false` are left out"""
import re, sys
from pathlib import Path
import nbformat
from nbclient import NotebookClient

root = Path(__file__).absolute().parent.parent

class Client(NotebookClient):
    async def async_execute_cell(self, cell, *args, **kwargs):
        if re.search(r'^#\|\s*eval:\s*false', cell.source, re.M): return cell
        return await super().async_execute_cell(cell, *args, **kwargs)

def join_streams(outputs):
    "Outputs with what was printed in several parts as one, since each is a box of its own on the page"
    joined = []
    for o in outputs:
        if joined and o.output_type==joined[-1].output_type=='stream' and o.name==joined[-1].name: joined[-1].text += o.text
        else: joined.append(o)
    return joined

def main():
    books = [Path(o).absolute() for o in sys.argv[1:]] or [o for o in sorted((root/'nbs').rglob('*.ipynb')) if '.ipynb_checkpoints' not in o.parts]
    for nb in books:
        print(nb.relative_to(root), flush=True)
        book = nbformat.read(nb, as_version=4)
        Client(book, timeout=3600, kernel_name='python3', resources={'metadata':{'path':str(nb.parent)}}).execute()
        for cell in book.cells:
            if cell.cell_type=='code': cell.outputs = join_streams(cell.outputs)
        nbformat.write(book, nb)

if __name__=='__main__': main()
