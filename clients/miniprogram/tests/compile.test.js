/** The sample compiles with WeChat's own compilers: what WeChat DevTools would refuse fails here. */
'use strict'

const assert = require('node:assert/strict')
const { spawnSync } = require('node:child_process')
const { chmodSync, readdirSync } = require('node:fs')
const path = require('node:path')
const { test } = require('node:test')

const SAMPLE = path.join(__dirname, '../sample')
const files = readdirSync(SAMPLE, { recursive: true })

function run(program, ...words) {
  const { status, stdout, stderr } = spawnSync(program, words, { cwd: SAMPLE, encoding: 'utf8', timeout: 100000 })
  assert.equal(status, 0, stdout + stderr)
  return stdout
}

test('its project, pages and scripts compile', () => {
  const printed = run(process.execPath, path.join(__dirname, 'compile.js'), SAMPLE)
  const compiled = JSON.parse(/^compiled (.*)$/m.exec(printed)[1])
  const left = files.filter((name) => path.extname(name) && !compiled.includes(name))
  assert.deepEqual(left, ['kuaishang.d.ts', 'project.config.json'].filter((name) => left.includes(name)))
})

for (const [program, extension] of [['wcc', '.wxml'], ['wcsc', '.wxss']]) {
  test(`its ${extension} files compile`, { skip: process.arch !== 'x64' && 'the compilers are for x64' }, () => {
    const compiler = path.join(__dirname, '../node_modules/miniprogram-compiler/bin/linux', program)
    chmodSync(compiler, 0o755)
    const names = files.filter((name) => name.endsWith(extension))
    assert.ok(names.length)
    names.forEach((name) => run(compiler, name))
  })
}
