const { createClient } = require('./kuaishang')
const { baseUrl } = require('./config')

module.exports = createClient({ baseUrl })
