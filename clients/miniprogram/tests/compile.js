/**
 * Compiles a mini-program as WeChat DevTools does before it uploads, with WeChat's own miniprogram-ci: the project's and
 * the pages' configuration, and the scripts. Usage: node compile.js FOLDER. Prints the compiled files' names.
 *
 * Asks WeChat for nothing: what it would say of the account (here read from 2.1.42) is replaced by its defaults.
 */
'use strict'

const ci = require('miniprogram-ci')

ci.proxy('http://127.0.0.1:1') // where nothing listens
const project = new ci.Project({
  appid: 'wx0123456789abcdef',
  type: 'miniProgram',
  projectPath: process.argv[2],
  privateKey: 'none',
})
project.attr = async () => ci.DefaultProjectAttr
const setting = { es6: true, enhance: true, minify: true }
ci.getCompiledResult({ project, version: '0', desc: '', setting, onProgressUpdate() {} }).then(
  (files) => {
    console.log(`compiled ${JSON.stringify(Object.keys(files))}`)
    process.exit(0) // it leaves its helper process running
  },
  (error) => {
    console.error(error)
    process.exit(1)
  },
)
