// The search of the local site. The sections to search, [address, page, heading, text], are in index.js, which is loaded when the box is first used

const place = (word, text) => text==word || text.endsWith('.'+word) ? 4 : !text.includes(word) ? 0 : /\w/.test(text.charAt(text.indexOf(word)-1)) ? 1 : 2
const score = (word, [, page, heading, text]) => 9*place(word, heading) + 3*place(word, page) + Math.min(text.split(word).length-1, 5)/5

let lower
function find(query, n=8) {
  lower ??= sections.map(o => o.map(s => s.toLowerCase()))
  const whole = query.trim().toLowerCase().replace(/^learn\./, 'learner.'), words = whole.split(/\s+/)
  const total = o => words.every(w => score(w, o)) ? [whole, ...words].reduce((sum, w) => sum+score(w, o), 0) : 0
  return whole ? lower.map((o, i) => [total(o), i]).filter(o => o[0]).sort((a, b) => b[0]-a[0]).slice(0, n).map(o => sections[o[1]]) : []
}

function wire(box, found, base) {
  const element = (name, props, ...children) => { const o = Object.assign(document.createElement(name), props); o.append(...children); return o }
  const close = () => found.replaceChildren()
  const excerpt = (text, at) => at<30 ? text.slice(0, 100) : text.slice(at-30, at+70).replace(/^\S* /, '… ')
  const link = ([url, page, heading, text]) => element('a', {href: base+url}, element('b', {}, heading), heading==page ? '' : ' – '+page,
    element('small', {}, excerpt(text, text.toLowerCase().indexOf(box.value.trim().toLowerCase()))))
  const show = () => {
    if (typeof sections=='undefined') return
    const links = find(box.value).map(link)
    found.replaceChildren(...(links.length || !box.value.trim() ? links : ['Nothing found']))
  }
  const keys = {
    ArrowDown: (links, at) => links[Math.min(at+1, links.length-1)]?.focus(),
    ArrowUp: (links, at) => (links[at-1] || box).focus(),
    Enter: (links, at) => links[Math.max(at, 0)]?.click(),
    Escape: (links, at) => { close(); at<0 ? box.blur() : box.focus() },
  }
  box.addEventListener('focus', () => document.head.append(element('script', {src: base+'index.js', onload: show})), {once: true})
  box.addEventListener('input', show)
  box.parentElement.addEventListener('keydown', e => { if (e.key in keys) { e.preventDefault(); keys[e.key]([...found.children], [...found.children].indexOf(e.target)) } })
  document.addEventListener('keydown', e => { if (e.key=='/' && e.target!=box && !e.ctrlKey && !e.metaKey) { e.preventDefault(); box.select() } })
  document.addEventListener('click', e => { if (e.target!=box) close() })
}

if (typeof document!='undefined') wire(document.querySelector('[type=search]'), document.querySelector('#found'), document.currentScript.src.replace('search.js', ''))
