const { simulator } = require('./config')
const { simulateLogin } = require('./simulator')

if (simulator) simulateLogin(simulator)

App({})
