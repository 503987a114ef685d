/**
 * Opens pages of the sample as WeChat renders them: miniprogram-simulate with WeChat's own compiler of WXML, over jsdom.
 * It renders components; so Page() is made of Component(), and this file calls the life cycle of pages.
 */
'use strict'

const assert = require('node:assert/strict')
const path = require('node:path')
const { JSDOM } = require('jsdom')

const SAMPLE = path.join(__dirname, '../sample')
const { window } = new JSDOM('', { pretendToBeVisual: true })
// Also those that node has: jsdom's nodes take jsdom's events alone.
const names = ['CustomEvent', 'Event', 'HTMLElement', 'Node', 'requestAnimationFrame']
Object.assign(globalThis, { window, document: window.document })
for (const name of names) globalThis[name] = window[name]
const simulate = require('miniprogram-simulate')

const running = new Set() // the promises of handlers

/** Wait until no handler of a page is at work. */
async function settle() {
  await new Promise(setImmediate) // the simulator dispatches events a little later
  while (running.size) await Promise.all(running)
}

function follow(method) {
  return function (...args) {
    const result = method.apply(this, args)
    if (result instanceof Promise) {
      const followed = result.finally(() => running.delete(followed))
      running.add(followed)
    }
    return result
  }
}

/** Copy what is no function as WeChat does for each page: by its own properties, without its class. */
function copy(value) {
  if (Array.isArray(value)) return value.map(copy)
  if (!value || typeof value !== 'object') return value
  return Object.fromEntries(Object.entries(value).map(([name, one]) => [name, copy(one)]))
}

globalThis.App = () => {}
globalThis.Page = (options) => {
  const own = Object.entries(options).filter(([name]) => name !== 'data')
  const isMethod = ([, value]) => typeof value === 'function'
  globalThis.Component({
    data: options.data,
    methods: Object.fromEntries(own.filter(isMethod).map(([name, method]) => [name, follow(method)])),
    created() {
      Object.assign(this, copy(Object.fromEntries(own.filter((one) => !isMethod(one)))))
    },
  })
}

class Page {
  /** @param {string} name such as `orders` */
  constructor(name) {
    this.component = simulate.render(simulate.load(path.join(SAMPLE, `pages/${name}/${name}`), { rootPath: SAMPLE }))
    this.component.attach(window.document.body)
  }

  /** Start its life cycle. */
  async open(query = {}) {
    await this.call('onLoad', query)
    await this.call('onShow')
    return this
  }

  async close() {
    await this.call('onUnload')
    this.component.detach()
  }

  async call(name, ...args) {
    this.component.instance[name]?.(...args)
    await settle()
  }

  /** Return the text of the element with this class, or null if there is none. */
  text(className) {
    const found = this.component.querySelector(`.${className}`)
    return found ? found.dom.textContent.trim().replace(/\s+/g, ' ') : null
  }

  texts(className) {
    return this.component.querySelectorAll(`.${className}`).map((found) => found.dom.textContent.trim())
  }

  /** Do something to the element with this class: `tap` it, `input` into it … */
  async act(className, event = 'tap', detail = {}, index = 0) {
    this.start(className, event, detail, index)
    await settle()
  }

  start(className, event = 'tap', detail = {}, index = 0) {
    const found = this.component.querySelectorAll(className.replace(/^(?=\w)/, '.'))[index]
    assert.ok(found, `no element ${className}`)
    found.dispatchEvent(event, { detail })
  }
}

module.exports = { Page, SAMPLE, settle }
