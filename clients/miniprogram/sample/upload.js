/**
 * 待您填写：把图片上传到对象存储（如腾讯云 COS），返回它的 https 地址。
 * TO FILL IN: upload the picture to your object store, and return its https URL.
 *
 * chooseAvatar 给出的是手机上的临时文件，别的手机打不开；快上只保存 http(s) 地址，不存图片。通常由您的服务端签发一次性的
 * 上传凭证，再用 wx.uploadFile 直传，例如：
 *
 *   const { url, formData, publicUrl } = await api.request({ method: 'POST', path: '/api/v1/uploads' }) // 您的接口
 *   await new Promise((success, fail) => wx.uploadFile({ url, filePath, name: 'file', formData, success, fail }))
 *   return publicUrl
 *
 * @param {string} filePath 手机上的临时文件
 * @returns {Promise<string>} 图片的 https 地址
 */
async function uploadAvatar(filePath) {
  throw new Error(`尚未配置图片上传：请在 upload.js 中填写 uploadAvatar（${filePath}）`)
}

module.exports = { uploadAvatar }
