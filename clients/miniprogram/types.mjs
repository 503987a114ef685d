/**
 * Writes kuaishang.d.ts from ../../openapi.json; `make client` runs it.
 *
 *   node types.mjs [OPENAPI_JSON [KUAISHANG_D_TS]]
 *
 * Every operation below /api/v1 whose success is JSON becomes a function named after its operation id. It takes one
 * object of path parameters, query parameters and body fields, and resolves to the `data` of the envelope. An operation
 * without an operation id, with two fields of one name, or with an error that has no example is an error.
 */
import { readFileSync, writeFileSync } from 'node:fs'
import { fileURLToPath } from 'node:url'
import openapiTS, { astToString } from 'openapi-typescript'
import ts from 'typescript'

const METHODS = ['get', 'post', 'put', 'patch', 'delete']
const here = name => fileURLToPath(new URL(name, import.meta.url))
const [input = here('../../openapi.json'), output = here('kuaishang.d.ts')] = process.argv.slice(2)
const document = JSON.parse(readFileSync(input, 'utf8'))

/** Return what a $ref points to, or the value itself. */
function resolve(value) {
  while (value?.$ref) value = value.$ref.slice(2).split('/').reduce((node, key) => node[key], document)
  return value
}

/** Return the schema as the service sends it: a field that has a default is never left out. */
function asReceived(schema) {
  const { properties = {}, required = [] } = schema
  const filled = Object.keys(properties).filter(name => 'default' in properties[name])
  return filled.length ? { ...schema, required: [...new Set([...required, ...filled])] } : schema
}

/** Return the schema of the one object that an operation takes, or undefined if it takes nothing. */
function argsSchema(id, parameters, body) {
  const properties = {}
  for (const { in: place, name, description, schema } of parameters) {
    const types = [].concat(schema.type).filter(type => type !== 'null') // a query string has no null
    if (place === 'path' && types.includes('string')) types.push('number') // an id, or `me`
    properties[name] = { ...schema, description, type: types.length > 1 ? types : types[0] }
  }
  if (!body && !parameters.length) return undefined
  const needed = parameters.filter(one => one.required).map(one => one.name)
  const merge = part => {
    const one = resolve(part)
    const twice = Object.keys(one.properties).filter(name => name in properties)
    if (twice.length) throw new Error(`${id}: two fields are named ${twice}`)
    return { ...one, properties: { ...properties, ...one.properties }, required: [...needed, ...(one.required ?? [])] }
  }
  return body?.oneOf ? { oneOf: body.oneOf.map(merge) } : merge(body ?? { type: 'object', properties: {} })
}

/** Return the business codes that an operation's responses have examples of, in order. */
function businessCodes(id, responses) {
  const codes = new Set()
  for (const [status, response] of Object.entries(responses)) {
    if (/^[23]/.test(status)) continue
    const { examples = {} } = resolve(response).content['application/json']
    const found = Object.values(examples).map(example => resolve(example).value.code)
    if (!found.length) throw new Error(`${id}: the response ${status} has no example of a business code`)
    found.forEach(code => codes.add(code))
  }
  return [...codes].sort((a, b) => a - b)
}

/** Return a JSDoc comment, or nothing. */
function comment(text, indent = '  ') {
  if (!text) return ''
  const lines = text.replaceAll('*/', '* /').split('\n').map(line => `${indent} * ${line}`.trimEnd())
  return lines.length > 1 ? `${indent}/**\n${lines.join('\n')}\n${indent} */\n` : `${indent}/** ${text} */\n`
}

/** Return the operations that the client calls, with the schemas that they need. */
function readOperations() {
  const operations = []
  const schemas = {}
  const keep = (value, convert) => {
    if (value === null || typeof value !== 'object') return
    const name = value.$ref?.split('/').pop()
    if (name && !(name in schemas)) {
      schemas[name] = convert(resolve(value))
      keep(schemas[name], convert)
    }
    Object.values(value).forEach(one => keep(one, convert))
  }
  for (const [path, item] of Object.entries(document.paths)) {
    if (!path.startsWith('/api/v1/')) continue // the probes and metrics
    for (const method of METHODS.filter(one => one in item)) {
      const operation = item[method]
      const id = operation.operationId
      if (!id) throw new Error(`${method.toUpperCase()} ${path} has no operation id`)
      const success = resolve(Object.entries(operation.responses).find(([status]) => /^2/.test(status))?.[1])
      const envelope = resolve(success?.content?.['application/json']?.schema)
      if (!envelope?.properties) continue // for WeChat, or a browser
      const isLogin = id === 'logIn' // wx.login gives the code, and the client keeps the token
      const data = isLogin ? resolve(envelope.properties.data).properties.user : envelope.properties.data
      const parameters = [...(item.parameters ?? []), ...(operation.parameters ?? [])].map(resolve)
      const named = parameters.filter(one => one.in === 'path' || one.in === 'query')
      const body = operation.requestBody?.content['application/json'].schema
      const args = isLogin ? undefined : argsSchema(id, named, resolve(body))
      const name = `${id[0].toUpperCase()}${id.slice(1)}Args`
      keep(data, asReceived)
      keep(args ?? null, schema => schema)
      if (args) schemas[name] = args
      operations.push({
        id,
        args: args && name,
        optional: !(args?.oneOf ?? [args]).some(one => one?.required?.length),
        data: data.$ref ? data.$ref.split('/').pop() : 'Empty',
        codes: businessCodes(id, operation.responses),
        text: [operation.summary, operation.description].filter(Boolean).join('\n\n'),
      })
    }
  }
  return { operations, schemas }
}

/** Return the declarations of the schemas, by openapi-typescript, each as an interface or a type of its own. */
async function declarations(schemas) {
  const nodes = await openapiTS(
    { openapi: document.openapi, info: document.info, paths: {}, components: { schemas } },
    { defaultNonNullable: false, silent: true },
  )
  const components = nodes.find(node => ts.isInterfaceDeclaration(node) && node.name.text === 'components')
  const members = components.members.find(member => member.name.text === 'schemas').type.members
  const exported = [ts.factory.createModifier(ts.SyntaxKind.ExportKeyword)]
  const declared = members.map(({ name, type, ...member }) => {
    const node = ts.isTypeLiteralNode(type)
      ? ts.factory.createInterfaceDeclaration(exported, name.text, undefined, undefined, type.members)
      : ts.factory.createTypeAliasDeclaration(exported, name.text, undefined, type)
    return ts.setSyntheticLeadingComments(node, ts.getSyntheticLeadingComments(member))
  })
  return astToString(declared).replaceAll(/components\["schemas"\]\["(\w+)"\]/g, '$1')
}

const { operations, schemas } = readOperations()
const client = operations.map(({ id, args, optional, data, text }) =>
  id === 'logIn'
    ? ''
    : `${comment(text)}  ${id}(args${optional ? '?' : ''}: ${args ?? 'Empty'}, options?: Options): Promise<${data}>`,
)
const codes = operations.map(({ id, codes }) => `  ${id}: ${codes.join(' | ')}`)
const declared = await declarations(schemas)
const template = readFileSync(here('types.in.d.ts'), 'utf8')
writeFileSync(
  output,
  template
    .replace('/* SCHEMAS */\n', () => declared)
    .replace('  /* OPERATIONS */\n', () => `${client.filter(Boolean).join('\n')}\n`)
    .replace('  /* CODES */\n', () => `${codes.join('\n')}\n`),
)
