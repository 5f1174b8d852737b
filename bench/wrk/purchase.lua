-- Purchases of one unit, for each pair of customer and product: wrk -s purchase.lua URL -- TOKENS PRODUCTS
-- Several customers, so that what one customer may have under way is not what is measured.

local witness = require("witness")

function init(args)
  local tokens, products, requests = witness.lines(args[1]), witness.lines(args[2]), {}
  for _, product in ipairs(products) do
    for _, token in ipairs(tokens) do
      local headers = { Authorization = "Bearer " .. token, ["Content-Type"] = "application/json" }
      local body = '{"purchase_items":[{"product_id":' .. product .. ',"amount":1}],"payment":{"currency_code":"NT"}}'
      requests[#requests + 1] = wrk.format("POST", "/api/purchase", headers, body)
    end
  end
  witness.send(requests)
end

function done(summary) witness.tell(summary) end
